"""Whole runs of encoders, by masked language modeling and classification: killed, gone on with, evaluated, exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForSequenceClassification

import megatrain
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.lock import is_alive
from megatrain.errors import ConfigError
from megatrain.observe.figures import figures_of
from megatrain.train.convert import export_checkpoint
from megatrain.train.evaluation import evaluate_checkpoint
from tests.image_data import image_config
from tests.labeled_data import NUM_LABELS
from tests.runs import Metrics, TrainProcess, tiny_config, wait_until, write_config
from tests.served import ServedRanks

BERT = {"family": "bert", "num_key_value_heads": None, "hidden_dropout": 0.1}
ALONE = {"packing": "best_fit", "document_mask": True}
KINDS: dict[str, tuple[str, Callable[..., dict[str, Any]], dict[str, dict[str, Any]]]] = {
    "masked_lm": (
        "masked_data",
        tiny_config,
        {"model": BERT, "data": ALONE, "objective": {"masked_lm": {"whole_word_mask": True}}},
    ),
    "classifier": ("labeled_data", tiny_config, {"model": {**BERT, "num_labels": NUM_LABELS}, "data": ALONE}),
    "vit": ("image_data", image_config, {"model": {"hidden_dropout": 0.1}}),
}
"""The fixture that makes a kind's data, its usual config, and what is laid over that."""
IN_TRANSFORMERS: dict[str, Any] = {
    "masked_lm": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
}
TRAIN = {"steps": 10, "eval_every_steps": 5, "eval_batches": None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked_lm", "classifier", pytest.param("vit", marks=pytest.mark.acceptance)])
def test_a_killed_encoder_goes_on_exactly(
    kind: str, two_ranks: ServedRanks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """To the last bit. Then `eval` finds the loss of the run's last evaluation, and transformers has its logits."""
    fixture, usual, sections = KINDS[kind]
    data, configs = request.getfixturevalue(fixture), {}
    for name in ("straight", "killed"):
        config = usual(data, tmp_path / name)
        for section, keys in {"train": TRAIN, "checkpoint": {"every_steps": 1}, **sections}.items():
            config[section] = {**config.get(section, {}), **keys}
        configs[name] = write_config(tmp_path / f"{name}.yaml", config)
    two_ranks.finish(configs["straight"])
    process = TrainProcess(configs["killed"], 2)
    process.wait_for_step(4)
    process.kill_all()
    process.wait()
    wait_until(lambda: not is_alive(tmp_path / "killed"))
    assert Metrics.read(tmp_path / "killed").steps[-1] < 10
    two_ranks.finish(configs["killed"])
    straight, killed = (Metrics.read(tmp_path / name) for name in configs)
    assert (killed.steps, killed.losses, killed.norms) == (straight.steps, straight.losses, straight.norms)
    figures = evaluate_checkpoint(locate(tmp_path / "killed"), data.held_out, show_progress=False)
    validations = megatrain.open_run(tmp_path / "killed").validations
    assert figures["loss"] == pytest.approx(validations["validation_loss"][-1].as_py())
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    lines = [orjson.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_bytes().splitlines()]
    *_, shown = (figures_of(line) for line in lines if "validation_loss" in line)
    assert shown.get("validation/perplexity") == pytest.approx(figures.get("perplexity"))
    assert ("perplexity" in figures) == (kind == "masked_lm")
    export_checkpoint(locate(tmp_path / "killed"), tmp_path / "hf")
    pixels, ids = torch.randn(2, 3, 12, 12), torch.randint(0, 500, (2, 40))
    inputs, ours = pixels if kind == "vit" else ids, megatrain.load(tmp_path / "killed")
    with torch.no_grad():
        theirs = IN_TRANSFORMERS[kind].from_pretrained(tmp_path / "hf").eval()(inputs).logits
    torch.testing.assert_close(ours.logits(inputs), theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"A (bert|vit) reads .*, and cannot generate"):
        ours.generate([1, 2, 3])

"""Whole runs of masked language modeling: killed, gone on with, evaluated, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import megatrain
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.lock import is_alive
from megatrain.errors import ConfigError
from megatrain.train.convert import export_checkpoint
from megatrain.train.evaluation import evaluate_checkpoint
from tests.runs import Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config
from tests.served import ServedRanks

SECTIONS = {
    "model": {"family": "bert", "num_key_value_heads": None, "hidden_dropout": 0.1},
    "objective": {"masked_lm": {"whole_word_mask": True}},
    "train": {"steps": 10, "eval_every_steps": 5, "eval_batches": None},
    "checkpoint": {"every_steps": 1},
}


@pytest.mark.slow
def test_a_killed_bert_goes_on_exactly(masked_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    """To the last bit. Then `eval` finds the loss of the run's last evaluation, and transformers has its logits."""
    configs = {}
    for name in ("straight", "killed"):
        config = tiny_config(masked_data, tmp_path / name)
        for section, keys in SECTIONS.items():
            config[section] = {**config.get(section, {}), **keys}
        config["data"] |= {"packing": "best_fit", "document_mask": True}
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
    figures = evaluate_checkpoint(locate(tmp_path / "killed"), masked_data.held_out, show_progress=False)
    validations = megatrain.open_run(tmp_path / "killed").validations
    assert figures["loss"] == pytest.approx(validations["validation_loss"][-1].as_py())
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert "bits_per_byte" not in figures
    export_checkpoint(locate(tmp_path / "killed"), tmp_path / "hf")
    ids, ours = torch.randint(0, 500, (2, 40)), megatrain.load(tmp_path / "killed")
    with torch.no_grad():
        theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()(ids).logits
    torch.testing.assert_close(ours.logits(ids), theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="A bert reads a text from both sides, and cannot generate"):
        ours.generate([1, 2, 3])

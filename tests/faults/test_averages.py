"""A run that averages its weights, with its own kinds that do not decay: resumed, evaluated, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import megatrain
from megatrain.checkpoint.manifest import read_manifest
from megatrain.errors import ConfigError
from megatrain.train.convert import export_checkpoint
from megatrain.train.evaluation import evaluate_checkpoint
from tests.parity.figures import gather_state
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

SECTIONS: dict[str, Any] = {
    "train": {"steps": 6, "eval_every_steps": 6},
    "checkpoint": {"every_steps": 3},
    "optimizer": {"lr": 3.0e-3, "ema_decay": 0.9, "no_weight_decay": ["norms", "embeddings"]},
    "schedule": {"type": "inverse_sqrt", "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def run(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages") / "run"
    two_ranks.finish(write_config(folder.parent / "run.yaml", tiny_config(tiny_data, folder, **SECTIONS)))
    return folder


def averages_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for (name, kind), tensor in gather_state(checkpoint).items() if kind == "ema"}


def test_a_resumed_run_ends_with_the_same_average(
    run: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **SECTIONS))
    two_ranks.finish(config, "train.steps=3")
    two_ranks.finish(config)
    straight, resumed = (gather_state(each / "checkpoints" / "step-00000006") for each in (run, tmp_path / "run"))
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    rates = [json.loads(line).get("lr") for line in (tmp_path / "run" / "metrics.jsonl").open()]
    peak = 3.0e-3
    assert [r for r in rates if r] == pytest.approx([peak / 2, *(peak * (2 / n) ** 0.5 for n in range(2, 7))])


def test_averaged_weights_are_used_on_demand(run: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    expected = averages_of(run / "checkpoints" / "step-00000006")
    model, plain = megatrain.load(run, ema=True), megatrain.load(run)
    parameters, others = dict(model.module.named_parameters()), dict(plain.module.named_parameters())
    for name, average in expected.items():
        assert torch.equal(parameters[name].detach().flatten(), average)
        assert not torch.equal(parameters[name], others[name])
    export_checkpoint(run, tmp_path / "hf", ema=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model.logits(ids), atol=1e-5, rtol=1e-5)
    losses = [
        evaluate_checkpoint(run, tiny_data.held_out, show_progress=False, ema=ema)["loss"] for ema in (False, True)
    ]
    command = [
        sys.executable,
        "-m",
        "megatrain",
        "eval",
        str(run),
        "--data",
        str(tiny_data.held_out),
        "--ema",
        "--json",
    ]
    shown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert shown["loss"] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != losses[1]


def test_an_average_that_was_not_kept_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"holds no averaged weights: its run was trained without optimizer\.ema_decay"
    ):
        megatrain.load(finished_run, ema=True)
    with pytest.raises(ConfigError, match="holds no averaged weights"):
        export_checkpoint(finished_run, tmp_path / "hf", ema=True)


def test_an_average_may_begin_at_a_resume(
    tiny_data: TinyData, two_ranks: ServedRanks, run: Path, tmp_path: Path
) -> None:
    """And end at one: then checkpoints hold none."""
    sections = {**SECTIONS, "optimizer": {"lr": 3.0e-3}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections))
    checkpoints = tmp_path / "run" / "checkpoints"
    two_ranks.finish(config, "train.steps=3")
    assert not read_manifest(checkpoints / "step-00000003").has_average
    two_ranks.finish(config, "optimizer.ema_decay=0.9")
    assert averages_of(checkpoints / "step-00000006").keys() == averages_of(run / "checkpoints/step-00000006").keys()
    two_ranks.finish(config, "train.steps=9", "optimizer.ema_decay=null")
    assert averages_of(checkpoints / "step-00000009") == {}

"""A run that averages its weights, with its own kinds that do not decay: resumed, evaluated, exported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import megatrain
from megatrain import cli
from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.manifest import MANIFEST, read_manifest
from megatrain.errors import CheckpointError, ConfigError
from megatrain.train.average import average_checkpoints
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


def test_averaged_weights_are_used_on_demand(
    run: Path,
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
    monkeypatch.setattr(
        sys, "argv", ["megatrain", "eval", str(run), "--data", str(tiny_data.held_out), "--ema", "--json"]
    )
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["loss"] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != losses[1]


def test_a_run_begins_with_averaged_weights(
    run: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    own = {"init_from": str(run), "init_from_ema": True}
    sections = {"run": own, "train": {"steps": 1}, "schedule": {"warmup_steps": 0}, "optimizer": {"lr": 0.0}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections))
    two_ranks.finish(config)
    state, expected = (
        gather_state(tmp_path / "run/checkpoints/step-00000001"),
        averages_of(run / "checkpoints/step-00000006"),
    )
    assert [name for name, average in expected.items() if not torch.equal(state[name, "weight"], average)] == []
    plain = two_ranks.train(config, f"run.init_from={tmp_path / 'run'}", f"run.dir={tmp_path / 'second'}")
    assert (set(plain.codes), "run.init_from_ema" in "".join(plain.output)) == ({2}, True)


def test_the_last_checkpoints_are_averaged(run: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    """Of uneven parts of tensors, so that each is put together from several files."""
    out = tmp_path / "averaged"
    assert average_checkpoints(run, 2, out, file_elements=5001) == [3, 6]
    assert (verify(out)[0], len(list(out.glob("rank-*"))) > 2) == ([], True)
    three, six = (gather_state(run / "checkpoints" / f"step-0000000{step}") for step in (3, 6))
    found = gather_state(out)
    assert found.keys() == {(name, kind) for name, kind in six if kind == "weight"}
    for key, mean in found.items():
        assert torch.equal(mean, ((three[key].double() + six[key].double()) / 2).float())
    assert not read_manifest(out).has_average
    loss = evaluate_checkpoint(out, tiny_data.held_out, show_progress=False)["loss"]
    assert loss != evaluate_checkpoint(run, tiny_data.held_out, show_progress=False)["loss"]


def test_equal_checkpoints_are_their_mean(run: Path, tmp_path: Path) -> None:
    """Bit for bit, also where their number is no power of two."""
    source, copies = run / "checkpoints" / "step-00000006", tmp_path / "checkpoints"
    for step in range(1, 8):
        folder = copies / f"step-{step:08d}"
        shutil.copytree(source, folder)
        (folder / MANIFEST).write_bytes(read_manifest(source).model_copy(update={"step": step}).encode())
    assert average_checkpoints(copies, 7, tmp_path / "averaged") == [*range(1, 8)]
    found, weights = gather_state(tmp_path / "averaged"), gather_state(source)
    assert [key for key, mean in found.items() if not torch.equal(mean, weights[key])] == []
    with pytest.raises(CheckpointError, match=r"has 7 good checkpoint\(s\), and --last asks for 8"):
        average_checkpoints(copies, 8, tmp_path / "more")


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

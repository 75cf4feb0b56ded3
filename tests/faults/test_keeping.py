"""Which checkpoints stay: on request, for good, the best; and going back to one on purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.store import PosixStore
from tests.faults.conftest import Copy
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks


def _steps(run_dir: Path) -> list[int]:
    return [found.step for found in PosixStore(run_dir / "checkpoints").list() if found.good]


def test_touching_save_now_saves_once_and_keeps_it(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sections = {"train": {"steps": 6}, "checkpoint": {"every_steps": 100, "keep": 1}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, **sections))
    run_dir.mkdir()
    (run_dir / "save-now").touch()
    two_ranks.finish(config)
    assert _steps(run_dir) == [1, 6]
    assert not (run_dir / "save-now").exists()
    two_ranks.finish(config, "train.steps=9")
    assert _steps(run_dir) == [1, 9]
    assert read_manifest(run_dir / "checkpoints" / "step-00000001").on_request


def test_the_nth_and_the_best_by_validation_stay(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    kept = {"every_steps": 1, "keep": 1, "keep_every_steps": 4, "keep_best": 1}
    sections = {"train": {"steps": 7, "eval_every_steps": 2}, "checkpoint": kept, "optimizer": {"lr": 0.5}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, **sections))
    two_ranks.finish(config)
    manifests = {step: read_manifest(run_dir / "checkpoints" / f"step-{step:08d}") for step in _steps(run_dir)}
    losses = {m["step"]: m["validation_loss"] for m in _validations(run_dir)}
    best = min(losses, key=lambda step: losses[step])
    assert sorted(manifests) == sorted({4, 7, best})
    assert {step: manifest.validation_loss for step, manifest in manifests.items()} == {
        step: losses.get(step) for step in manifests
    }


def _validations(run_dir: Path) -> list[dict[str, float]]:
    import json

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


@pytest.mark.slow
def test_rewinding_trains_the_same_from_that_step(
    copy_run: object, two_ranks: ServedRanks, losses: list[float]
) -> None:
    run: Copy = copy_run()  # type: ignore[operator]
    rewind = [sys.executable, "-m", "megatrain", "checkpoint", "rewind", str(run.run_dir), "--step", "2"]
    ended = subprocess.run(rewind, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "step        6  set aside" in ended.stdout
    assert _steps(run.run_dir) == [2]
    two_ranks.finish(run.config)
    metrics = Metrics.read(run.run_dir)
    assert metrics.losses == losses
    assert [event["step"] for event in metrics.events if event["event"] == "resume"] == [2]
    assert _steps(run.run_dir) == [2, 4, 6]
    assert len(list((run.run_dir / "checkpoints").glob("set-aside-*"))) == 2


def test_a_changed_checkpoint_folder_never_starts_afresh(
    copy_run: object, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    run: Copy = copy_run()  # type: ignore[operator]
    ended = two_ranks.train(run.config, f"checkpoint.dir={tmp_path / 'elsewhere'}")
    assert ended.codes == [4, 4], ended.output
    assert f"checkpoints are in {run.run_dir / 'checkpoints'}" in "".join(ended.output)


RUINED = ("optimizer.lr=1e39",)  # the first update makes weights that are not finite
SKIPPED = ("train.precision=fp16", "train.initial_loss_scale_power=32")  # no gradient is finite


@pytest.mark.parametrize(
    "background", ["checkpoint.background=true", pytest.param("checkpoint.background=false", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fault", [RUINED, SKIPPED], ids=["ruined", "skipped"])
def test_no_diverged_state_replaces_a_good_checkpoint(
    fault: tuple[str, ...], background: str, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    sections = {"train": {"steps": 4}, "checkpoint": {"every_steps": 1, "keep": 1}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, **sections))
    two_ranks.finish(config)
    assert _steps(run_dir) == [4]
    ended = two_ranks.train(config, "train.steps=30", "spikes.max_in_a_row=5", background, *fault)
    output = "".join(ended.output)
    assert ended.codes == [2, 2], output
    assert _steps(run_dir) == [4]
    gave_up = [event for event in Metrics.read(run_dir).events if event["event"] == "diverged"]
    assert len(gave_up) == 1
    assert "megatrain checkpoint rewind" in gave_up[0]["message"]

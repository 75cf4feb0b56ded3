"""What a run's folder says of it is what happened: the configs it trained with, what a resume changes, where it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain.checkpoint.manifest import read_manifest
from megatrain.config import load
from megatrain.observe.record import read_run
from megatrain.plan.this_machine import cpu_computes_bf16
from tests.faults.conftest import Copy
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks


def _resume(run_dir: Path) -> dict[str, Any]:
    return [event for event in Metrics.read(run_dir).events if event["event"] == "resume"][-1]


def _lr(path: Path) -> object:
    return yaml.safe_load(path.read_text())["optimizer"]["lr"]


def test_a_start_without_steps_changes_no_record(copy_run: Callable[[], Copy], one_rank: ServedRanks) -> None:
    run = copy_run()
    before = (run.run_dir / "config.yaml").read_bytes()
    one_rank.finish(run.config, "optimizer.lr=0.25", "schedule.type=constant")
    assert (run.run_dir / "config.yaml").read_bytes() == before
    assert [path.name for path in run.run_dir.glob("config-step-*.yaml")] == ["config-step-0.yaml"]
    assert _resume(run.run_dir)["changes"]["optimizer.lr"] == [0.001, 0.25]
    assert "nothing was trained" in Metrics.read(run.run_dir).events[-1]["message"]


def test_each_resume_tells_differences_and_keeps_its_config(
    copy_run: Callable[[], Copy], one_rank: ServedRanks, tmp_path: Path
) -> None:
    run = copy_run()
    ended = one_rank.train(run.config, "train.steps=8", "optimizer.lr=0.002", "train.gradient_clipping=0.5")
    assert ended.codes == [0], ended.output
    changes = _resume(run.run_dir)["changes"]
    assert changes == {
        "run.dir": [changes["run.dir"][0], str(run.run_dir)],  # it is a copy
        "optimizer.lr": [0.001, 0.002],
        "train.gradient_clipping": [1.0, 0.5],
        "train.steps": [6, 8],
        "learning rate": [0.001, 0.002],
    }
    assert "optimizer.lr" in ended.output[0]
    assert "was 0.001 and is now 0.002" in ended.output[0]
    assert [_lr(run.run_dir / f"config-step-{step}.yaml") for step in (0, 6)] == [0.001, 0.002]
    assert _lr(run.run_dir / "config.yaml") == 0.002
    assert list(read_run(run.run_dir).configs) == [0, 6]
    one_rank.finish(run.config, "train.steps=8", "optimizer.lr=0.002", "train.gradient_clipping=0.5")
    assert "changes" not in _resume(run.run_dir)


def test_what_was_given_is_repeated_or_named_anew(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, train={"steps": 2}))
    given = ("optimizer.lr=0.003", "data.train.0.weight=3.0", "observe.log_every_steps=2")
    one_rank.finish(config, *given)
    ended = one_rank.train(config, "train.steps=4", "data.train.0.weight=3.0")
    assert ended.codes == [4], ended.output
    assert (
        "leaves out: optimizer.lr was 0.003 and would be 0.001. Give them again (optimizer.lr=0.003)" in ended.output[0]
    )
    assert "(optimizer.lr=0.001)" in ended.output[0]
    assert _lr(run_dir / "config.yaml") == 0.003
    one_rank.finish(config, "train.steps=4", "data.train.0.weight=3.0", "optimizer.lr=0.001")
    assert _resume(run_dir)["changes"]["learning rate"] == [0.003, 0.001]


def test_missing_checkpoints_are_never_passed_over_silently(
    tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    sections = {"train": {"steps": 2}, "checkpoint": {"dir": "kept", "every_steps": 1}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, **sections))
    assert load(config).checkpoint.dir == str(here / "kept")
    place = f"checkpoint.dir={here / 'kept'}"  # the ranks stand elsewhere
    one_rank.finish(config, place)
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["checkpoint"]["dir"] == str(here / "kept")
    for missing in ("moved", "emptied"):
        (here / "kept").rename(tmp_path / missing)
        if missing == "emptied":
            (here / "kept").mkdir()
        ended = one_rank.train(config, place, "train.steps=4")
        assert ended.codes == [4]
        assert "has saved checkpoints, up to step 2" in ended.output[0]
        assert not list((here / "kept").glob(".generation-*"))  # nothing is written where a disk is to be mounted
        assert (run_dir / "metrics.jsonl").read_bytes() == metrics
        shutil.rmtree(here / "kept", ignore_errors=True)
        (tmp_path / missing).rename(here / "kept")
    one_rank.finish(config, place, "train.steps=3")
    assert Metrics.read(run_dir).steps == [1, 2, 3]


def test_a_runs_own_record_leads_to_that_run(copy_run: Callable[[], Copy], one_rank: ServedRanks) -> None:
    run = copy_run()  # its config.yaml names the folder that it was copied from
    ended = one_rank.train(run.run_dir / "config.yaml")
    assert ended.codes == [2]
    assert f"Add run.dir={run.run_dir} to go on with that run" in ended.output[0]
    one_rank.finish(run.run_dir / "config.yaml", f"run.dir={run.run_dir}", "train.steps=7")
    assert Metrics.read(run.run_dir).steps[-1] == 7
    one_rank.finish(run.run_dir / "config.yaml", "train.steps=8")  # which has become its own
    assert Metrics.read(run.run_dir).steps[-1] == 8


def test_a_run_that_was_never_saved_begins_again(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train={"steps": 2}))
    one_rank.finish(config)
    run_dir = tmp_path / "run"
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(line for line in lines if b'"save"' not in line))
    shutil.rmtree(run_dir / "checkpoints")
    one_rank.finish(config)
    assert Metrics.read(run_dir).steps == [1, 2]


def test_precision_auto_is_recorded_as_what_it_became(
    tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    sections = {"train": {"steps": 2, "precision": "auto", "eval_batches": 1}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections))
    two_ranks.finish(config)
    became = "bf16" if cpu_computes_bf16() else "fp32"
    assert load(tmp_path / "run" / "config.yaml").train.precision == became
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/manifest.json")
    assert read_manifest(manifest.parent).layout["precision"] == became

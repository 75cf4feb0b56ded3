from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.status import read_status
from megatrain.checkpoint import lock
from megatrain.distributed import failures
from tests.unit.launcher.conftest import CONFIG, Launch

NOW = 1_000_000.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has logged 20 of 40 steps, one a second, the last one ten seconds ago, and saved after the 15th."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.1)
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints/step-00000015").mkdir(parents=True)
    (run_dir / "checkpoints/step-00000015/manifest.json").touch()
    config = {**CONFIG, "run": {"dir": "elsewhere"}, "checkpoint": {"every_steps": 5}}
    config["train"] = {**CONFIG["train"], "steps": 40}  # type: ignore[dict-item]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    write(run_dir, {"event": "start", "step": 0, "time": NOW - 40})
    for step in range(1, 21):
        figures = {"loss": 3.0 - step / 100, "step_seconds": 1.0 + step % 2, "tokens_per_second": 2e6, "mfu": 0.41}
        goodput = {"training": 30.0, "saving": 5.0, "restarting": 5.0, "recomputing": 0.0, "waiting": 0.0}
        write(run_dir, {"step": step, **figures, "goodput": goodput, "time": NOW - 30 + step})
        if step == 15:
            write(run_dir, {"event": "save", "step": step, "path": "x", "seconds": 0.1, "time": NOW - 15})
    return run_dir


@pytest.fixture
def held(run: Path) -> Iterator[None]:
    with lock.locked(run, {"host": "node7", "slurm_job": "12"}):
        yield


def write(run_dir: Path, line: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{says}'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("held")
def test_a_run_under_way_tells_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, monkeypatch, "RUNNING|1:02:03|node[7-8]|None|2026-11-28T00:00:00")
    assert list(read_status(run, NOW).lines()) == [
        f"run        {run}",
        "job        running: host node7, slurm job 12 (RUNNING for 1:02:03 on node[7-8])",
        "step       20 of 40 (50%), loss 2.8000, logged 10s ago",
        "rate       1.5 s a step, 2.00M tokens/s, MFU 41.0%; 30s of training left",
        "last save  step 15, 15s ago",
        "goodput    75.0%",
        "wrong      nothing",
    ]


def test_looking_changes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    run.chmod(0o555)
    assert read_status(run, NOW).state == "stopped"
    run.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.usefixtures("held")
def test_a_silent_run_may_hang(run: Path) -> None:
    assert read_status(run, NOW + 40).problems == []
    (problem,) = read_status(run, NOW + 600).problems
    assert problem.startswith("nothing was logged for 10m 10s: ")


@pytest.mark.usefixtures("held")
def test_events_of_this_start_are_told_once_each(run: Path) -> None:
    write(run, {"event": "straggler", "step": 18, "message": "rank 1 is slow", "time": NOW})
    write(run, {"event": "resume", "step": 20, "time": NOW})
    for step in (21, 22):
        write(run, {"event": "skipped", "step": step, "message": f"no update in step {step}", "time": NOW})
    write(run, {"step": 22, "loss": None, "step_seconds": 1.0, "time": NOW})
    problems = read_status(run, NOW).problems
    assert problems == ["the loss is not finite", "skipped, 2 times, the last at step 22: no update in step 22"]


@pytest.mark.parametrize(
    ("code", "advice"), [(5, "start it again, and it goes on"), (3, "mend this, then start it again")]
)
def test_a_run_that_failed_says_why(code: int, advice: str, run: Path) -> None:
    failures.claim(run, "1", failures.Failure(3, code, "because"))
    assert read_status(run, NOW).problems == [
        f"no job trains it, it stands at step 20: {advice}",
        f"the last start ended with code {code}, rank 3 first: because",
    ]


def test_a_holder_that_died_has_nothing(run: Path) -> None:
    with lock.locked(run, {"host": "node7", "pid": "1"}):
        lease = (run / ".lock").read_bytes()
    (run / ".lock").write_bytes(lease)
    found = read_status(run, NOW)
    assert (found.state, found.job) == ("stopped", "no job holds it, the last one was host node7, pid 1")


def test_a_run_in_the_queue_says_what_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "logs").mkdir()
    for number in (9, 12):
        (run / f"logs/slurm-{number}.out").touch()
    squeue(tmp_path, monkeypatch, "PENDING|0:00||Resources|2026-11-29T00:00:00")
    found = read_status(run, NOW)
    assert (found.state, found.job) == ("queued", "slurm job 12 (PENDING, Resources, starts at 2026-11-29T00:00:00)")
    assert found.problems == []


def test_saves_that_do_not_come_are_noticed(run: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs/restarts.json").write_text('{"newest_step": null, "num_fruitless": 2, "was_asked": false}')
    shutil.rmtree(run / "checkpoints")
    write(run, {"event": "finish", "step": 20, "time": NOW})
    assert read_status(run, NOW).problems == []
    write(run, {"event": "resume", "step": 20, "time": NOW})
    assert read_status(run, NOW).problems[1:] == [
        "no checkpoint yet, though one is due every 5 steps",
        "2 start(s) in a row left no new checkpoint",
    ]


def test_an_object_store_is_not_asked(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["checkpoint"]["dir"] = "s3://nowhere/run"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_status(run, NOW).saved_step == 15


def test_a_folder_of_no_run_is_refused(tmp_path: Path, launch: Launch) -> None:
    ended = launch("status", str(tmp_path / "gone"))
    assert (ended.code, ended.out) == (2, "")
    assert "gone is no run folder" in ended.err


def test_the_status_as_json(run: Path, launch: Launch) -> None:
    found = json.loads(launch("status", str(run), "--json").out)
    assert (found["step"], found["num_steps"], found["saved_step"], found["state"]) == (20, 40, 15, "stopped")

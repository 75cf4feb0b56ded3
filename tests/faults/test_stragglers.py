"""A rank that is slower than the others for long is named, with what it is slow at."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config
from tests.served import ServedRanks


def throttle(process: psutil.Process, ended: threading.Event, stopped_seconds: float = 0.04) -> None:
    """Let a process run for a hundredth of a second, and then stop it for some, again and again."""
    while not ended.is_set():
        process.send_signal(signal.SIGSTOP)
        time.sleep(stopped_seconds)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_throttled_rank_is_named(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        train={"steps": 100_000, "hang_timeout_seconds": 120.0},
        checkpoint={"every_steps": 100_000},
        observe={"tensorboard": True, "log_every_steps": 10, "straggler_report_seconds": 0.5},
    )
    run = TrainProcess(write_config(tmp_path / "run.yaml", config), 2)
    ended = threading.Event()

    def straggler() -> list[str]:
        return [event["message"] for event in Metrics.read(run.run_dir).events if event["event"] == "straggler"]

    try:
        run.wait_for_step(10)
        thread = threading.Thread(target=throttle, args=(run.ranks()[1], ended))
        thread.start()
        wait_until(lambda: bool(straggler()) or run.process.poll() is not None)
        ended.set()
        thread.join()
        assert straggler()[0].startswith("rank 1 on ")
        assert "is slower than the others: the same arithmetic takes " in straggler()[0]
        lines = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
        compared = [line["ranks"] for line in lines if "ranks" in line]
        assert compared[-1]["arithmetic"]["slowest"] == 1
        assert compared[-1]["forward_backward"].keys() == {"min", "median", "max", "slowest"}
    finally:
        ended.set()
        run.kill_all()


def test_ranks_are_compared_at_logged_steps_alone(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    observe = {"tensorboard": False, "log_every_steps": 5, "straggler_report_seconds": 1e-9}
    config = tiny_config(tiny_data, tmp_path / "run", train={"steps": 12}, observe=observe)
    one_rank.finish(write_config(tmp_path / "run.yaml", config))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: "ranks" in line for line in lines if "loss" in line}
    assert logged == {5: True, 10: True, 12: True}

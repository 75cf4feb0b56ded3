"""A rank that stands still, wherever it does, ends the run in time with code 5, and is named with its host.

One that is slow, wherever it is, is no hang.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs import TinyData, TrainProcess, tiny_config, write_config

pytestmark = pytest.mark.slow
acceptance = pytest.mark.acceptance

HANG_TIMEOUT_SECONDS = 10.0
TRANSFORM = """
import os, signal, time
from pathlib import Path

def stand_still(tokens, random):
    if os.environ["RANK"] == "1" and (told := Path("{flag}")).exists():
        if told.read_text() == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)
    return tokens
"""


SLOW = """
import os, time
from megatrain.checkpoint import rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.model.decoder import DecoderStage

def slow(function, seconds):
    def slowly(*arguments):
        time.sleep(seconds)
        return function(*arguments)
    return slowly

if os.environ["RANK"] == "1":
    rank_file.write_all = slow(rank_file.write_all, {disk_seconds})
    CheckpointReader.read_into = slow(CheckpointReader.read_into, {disk_seconds})
    DecoderStage.forward = slow(DecoderStage.forward, 0.25)

def same(tokens, random):
    return tokens
"""


def _with_module(folder: Path, config: dict[str, Any], name: str, text: str, function: str) -> dict[str, str]:
    """The config with a transform out of such a module; the environment in which that is found."""
    (folder / f"{name}.py").write_text(text)
    config["data"]["train"][0]["transform"] = f"{name}:{function}"
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


class HangingRun:
    """A long run of two ranks, of which one is made to stand still."""

    def __init__(self, data: TinyData, folder: Path) -> None:
        self.folder, self.flag = folder, folder / "flag"
        config = tiny_config(
            data,
            folder / "run",
            train={"steps": 100_000, "hang_timeout_seconds": HANG_TIMEOUT_SECONDS},
            checkpoint={"every_steps": 200, "background": False},
        )
        module = TRANSFORM.format(flag=self.flag)
        environment = _with_module(folder, config, "standing", module, "stand_still")
        self.train = TrainProcess(write_config(folder / "run.yaml", config), 2, environment=environment)

    def end(self, interrupt: Callable[[TrainProcess], None]) -> str:
        """Interrupt it; what it says as it ends, in time and as a whole."""
        try:
            self.train.wait_for_step(5)
            interrupt(self.train)
            began = time.monotonic()
            code, output = self.train.wait()
            # The timeout, two looks at the heartbeats, and the launcher's own end.
            assert time.monotonic() - began < HANG_TIMEOUT_SECONDS + 30
            assert code == 5, output
            assert not self.train.ranks()
            assert "Traceback" not in output
            return output
        finally:
            self.train.kill_all()

    def stacks(self, rank: int) -> str:
        """What a rank's log has after its last words."""
        return (self.folder / "run" / "logs" / f"rank-{rank:05d}.log").read_text().partition("the stacks of all")[2]


@pytest.fixture
def run(tiny_data: TinyData, tmp_path: Path) -> HangingRun:
    return HangingRun(tiny_data, tmp_path)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=acceptance)])
def test_a_rank_stopped_in_a_step_is_named(rank: int, run: HangingRun) -> None:
    output = run.end(lambda train: train.ranks()[rank].send_signal(signal.SIGSTOP))
    named = "rank 0, which does not answer" if rank == 0 else f"rank 1 on {socket.gethostname()}, stopped or gone"
    assert f"the others wait for {named}" in output
    assert "train_batch" in run.stacks(1 - rank)


@acceptance
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt-get install strace)")
def test_a_rank_stopped_in_a_save_is_named(run: HangingRun) -> None:
    def interrupt(train: TrainProcess) -> None:
        folder = next((run.folder / "run" / "checkpoints").glob(".generation-*"))
        below = [f"-P{folder}/step-{step:08d}/rank-00001.safetensors" for step in range(200, 20_000, 200)]
        inject = ["-e", "trace=fsync", *below, "-e", "inject=fsync:signal=SIGSTOP:when=1"]
        pid = str(train.ranks()[1].pid)
        tracer = subprocess.Popen(["strace", "-f", "-p", pid, "-o", "/dev/null", *inject])
        train.wait_for_step(200)
        time.sleep(HANG_TIMEOUT_SECONDS / 2)
        tracer.kill()  # what it stopped stays so

    output = run.end(interrupt)
    assert f"the others wait for rank 1 on {socket.gethostname()}, stopped or gone" in output
    assert "finish" in run.stacks(0)


@acceptance
def test_a_rank_stopped_in_its_loader_is_named(run: HangingRun) -> None:
    output = run.end(lambda train: run.flag.write_text("stop") and None)
    assert f"the others wait for rank 1 on {socket.gethostname()}, stopped or gone" in output


@acceptance
def test_a_rank_without_data_is_named(run: HangingRun) -> None:
    output = run.end(lambda train: run.flag.write_text("sleep") and None)
    assert f"the others wait for rank 1 on {socket.gethostname()} in data of step " in output
    assert "stand_still" in run.stacks(1)


@acceptance
def test_slow_disks_and_long_evaluations_are_no_hang(tiny_data: TinyData, tmp_path: Path) -> None:
    hang_seconds = 6.0
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        parallel={"pipeline": 2},
        train={
            "steps": 2,
            "global_batch_size": 36,
            "micro_batch_size": 1,
            "eval_batches": 1,
            "eval_every_steps": 2,
            "precision": "fp32",
            "hang_timeout_seconds": hang_seconds,
        },
        checkpoint={"every_steps": 2, "background": False},
    )
    environment = _with_module(tmp_path, config, "slow", SLOW.format(disk_seconds=0.4), "same")
    path = write_config(tmp_path / "run.yaml", config)
    for steps in (2, 3):  # the second start reads what the first one wrote
        train = TrainProcess(path, 2, f"train.steps={steps}", environment=environment)
        try:
            code, output = train.wait()
        finally:
            train.kill_all()
        assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [line["parts"] for line in lines if "loss" in line]
    validation = [line["seconds"] for line in lines if "validation_loss" in line]
    restored = [line["startup_seconds"]["restore"] for line in lines if line.get("event") == "resume"]
    saved = [line["seconds"] for line in lines if line.get("event") == "save"]
    longest = min(parts[0]["forward_backward"], validation[0], restored[0], saved[0])
    assert longest > hang_seconds, (parts, validation, restored, saved)


@acceptance
def test_a_stuck_disk_is_reported_with_bytes_written(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        train={"steps": 2, "hang_timeout_seconds": HANG_TIMEOUT_SECONDS},
        checkpoint={"every_steps": 2},
    )
    environment = _with_module(tmp_path, config, "slow", SLOW.format(disk_seconds=1000), "same")
    train = TrainProcess(write_config(tmp_path / "run.yaml", config), 2, environment=environment)
    try:
        code, output = train.wait()
    finally:
        train.kill_all()
    assert code == 5, output
    assert re.search(r"wait for rank 1 on \S+ saving, 0 of \d+,\d{3} bytes written, at step 2\.", output), output

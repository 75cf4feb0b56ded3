"""Ranks that stay up and run the whole trainer, one config after another: starting them costs more than training."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from megatrain.distributed.bootstrap import free_port

GRACE_SECONDS = 60.0


class Ended(NamedTuple):
    """How a run ended: every rank's exit code, and what each printed."""

    codes: list[int]
    output: list[str]


class ServedRanks:
    """``num_ranks`` processes of ``tests.served.worker``, started on first use, and again after one has failed."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._processes: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix=f"served-{num_ranks}-")
        self._logs = Path(self._folder.name)

    def train(self, config: Path, *overrides: str) -> Ended:
        """What `python -m megatrain.train CONFIG OVERRIDES` does on every rank."""
        return self._run(str(config), *overrides)

    def profile(self, config: Path, out: Path, *arguments: str) -> Ended:
        """What `megatrain profile CONFIG --out OUT ARGUMENTS` does on every rank."""
        return self._run("profile", str(config), "--out", str(out), *arguments)

    def _run(self, *words: str) -> Ended:
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        answers = self._answers()
        if not all(answers):
            logs = [self._log(rank) for rank in range(self.num_ranks)]
            self.stop()
            raise AssertionError(f"ranks died or wait for one that failed: {answers}\n" + "\n".join(logs))
        read = [json.loads(answer) for answer in answers]
        ended = Ended([answer["code"] for answer in read], [answer["output"] for answer in read])
        if not set(ended.codes) <= {0, 2, 3, 4, 75}:  # what is left of torch's groups is of no more use
            self.stop()
        return ended

    def _answers(self) -> list[str]:
        """The line of each rank. Once one has failed, those that do not end soon wait for it: theirs are empty."""
        answers, deadline = [""] * self.num_ranks, math.inf
        waiting = {process.stdout: rank for rank, process in enumerate(self._processes) if process.stdout is not None}
        while waiting and time.monotonic() < deadline:
            for stream in select.select(list(waiting), [], [], 1.0)[0]:
                line = answers[waiting.pop(stream)] = stream.readline()
                if not line or json.loads(line)["code"] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def finish(self, config: Path, *overrides: str) -> None:
        """Train to the end; a failure shows what the ranks said."""
        ended = self.train(config, *overrides)
        assert ended.codes == [0] * self.num_ranks, "\n".join(ended.output)

    @property
    def pids(self) -> list[int]:
        """Of the ranks that are up, in order."""
        return [process.pid for process in self._processes]

    def stop(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def _start(self) -> None:
        port = str(free_port())
        for rank in range(self.num_ranks):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.num_ranks, "LOCAL_WORLD_SIZE": self.num_ranks}
            env = {**os.environ, **{name: str(value) for name, value in names.items()}}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            env |= {"OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            with (self._logs / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.served.worker"],
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    cwd=Path(__file__).parents[2],
                )
            self._processes.append(process)

    def _log(self, rank: int) -> str:
        return f"--- rank {rank}\n" + (self._logs / f"{rank}.log").read_text(errors="replace")[-3000:]

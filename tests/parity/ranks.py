"""Ranks that stay up and train many cases: the parity tests' engine room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from megatrain.distributed.bootstrap import free_port


class Ranks:
    """``num_ranks`` processes of ``tests.parity.worker``, started on first use, and again after one has failed."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: IO[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix=f"parity-{num_ranks}-")
        self._logs = Path(self._folder.name)

    def train(self, case: dict[str, Any]) -> dict[str, Any]:
        """Train one case on all ranks; its losses, gradient norms and validation loss."""
        if any(process.poll() is not None for process in self._processes):  # one died after its last answer
            self.stop()
        if not self._processes:
            self._start()
        line = json.dumps(case) + "\n"
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        assert self._answers is not None
        answer = self._answers.readline()
        if not answer or "error" in json.loads(answer):
            errors = [answer] + [self._log(rank) for rank in range(self.num_ranks)]
            self.stop()
            raise AssertionError("a rank failed:\n" + "\n".join(errors))
        result: dict[str, Any] = json.loads(answer)
        return result

    def stop(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []
        if self._answers is not None:
            self._answers.close()

    def _start(self) -> None:
        port = str(free_port())
        receive, send = os.pipe()
        self._answers = os.fdopen(receive)
        for rank in range(self.num_ranks):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.num_ranks),
                "LOCAL_WORLD_SIZE": str(self.num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
            }
            with (self._logs / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.parity.worker", str(send)],
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(send,),
                    text=True,
                    cwd=Path(__file__).parents[2],
                )
            self._processes.append(process)
        os.close(send)

    def _log(self, rank: int) -> str:
        text = (self._logs / f"{rank}.log").read_text(errors="replace")
        return f"--- rank {rank}\n{text[-3000:]}"

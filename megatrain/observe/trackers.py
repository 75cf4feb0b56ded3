"""A run's trackers (Weights & Biases, MLflow), each fed by a process of its own that follows RUN/metrics.jsonl.

So training neither waits for a tracker nor ends with one, whatever its library, its server or the network does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

FEEDER = [sys.executable, "-m", "megatrain.observe.track"]
CLOSE_SECONDS = 30.0
"""For what is left to send when a run ends. What is sent later than that, the next start sends."""


class TrackerProcess:
    """`python -m megatrain.observe.track NAME RUN STEP`, which ends once its standard input does: with this process.

    What it prints is logged here as a warning.
    """

    def __init__(self, name: str, run_dir: Path, resume_step: int) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        command = [*FEEDER, name, str(run_dir), str(resume_step)]
        try:
            with (run_dir / "logs" / f"tracker-{name}.log").open("ab") as log:
                # A session of its own: a signal to the ranks of a terminal or a job is none to it.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )
            os.set_blocking(self._output.fileno(), False)
        except OSError as error:
            logger.warning("%s cannot be started (%s); the run goes on without it", name, error.strerror)

    @property
    def _output(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout

    def report(self) -> None:
        """Log what it has printed since the last call. Waits for nothing."""
        if self._process is None:
            return
        for text in (self._output.read() or b"").decode(errors="replace").splitlines():
            logger.warning("%s: %s", self._name, text)

    def close(self) -> None:
        """Let it send what is left, for CLOSE_SECONDS at most."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended long ago
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.report()
        self._output.close()
        if self._process.returncode:
            logger.warning("%s has not got everything; RUN/logs/tracker-%s.log says why", self._name, self._name)
        self._process = None

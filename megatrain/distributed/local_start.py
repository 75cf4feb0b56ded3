"""Starts a command once a rank on this machine, for work that needs no watching over: `megatrain eval --procs`."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, Any

from megatrain.distributed.bootstrap import child_environment, local_rank_variables
from megatrain.errors import EXIT_OK, EXIT_RANK

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0  # for rank 0 to find what another has found


def run_ranks(command: Sequence[str], num_ranks: int, *, has_gpu: bool) -> int:
    """Run ``command`` on ``num_ranks`` local ranks until all have ended; the exit code of the first that failed.

    Rank 0 speaks. Of the others, the first that failed has its say; then all end.
    """
    before = signal.signal(signal.SIGTERM, _end)
    env = child_environment(num_ranks, has_gpu=has_gpu)
    ranks: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as files:
        told = [files.enter_context(tempfile.TemporaryFile()) for _ in range(num_ranks)]
        try:
            for number in range(num_ranks):
                output: dict[str, Any] = {} if number == 0 else {"stdout": subprocess.DEVNULL, "stderr": told[number]}
                here = {**env, **local_rank_variables(number, num_ranks)}
                ranks.append(subprocess.Popen(command, env=here, **output))
            failed = _first_to_fail(ranks)
            return EXIT_OK if failed is None else _explain(failed, ranks, told[failed])
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            signal.signal(signal.SIGTERM, before)


def _first_to_fail(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait; the number of the first rank that ended with anything but 0, or None once all have ended."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((number for number, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(_POLL_SECONDS)


def _explain(number: int, ranks: Sequence[subprocess.Popen[bytes]], told: IO[bytes]) -> int:
    """The exit code of a rank that failed, in our codes; what it said, unless rank 0 ends for the same reason."""
    code = ranks[number].returncode
    with contextlib.suppress(subprocess.TimeoutExpired):
        ranks[0].wait(_GRACE_SECONDS)
    ranks[0].kill()
    if ranks[0].wait() != code:
        told.seek(0)
        sys.stderr.write(told.read().decode(errors="replace"))
    if code > 0:
        return code
    sys.stderr.write(f"Rank {number} was killed ({signal.Signals(-code).name}).\n")
    return EXIT_RANK


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)

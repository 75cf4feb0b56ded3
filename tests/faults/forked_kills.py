"""Work run in forks of one process that has imported everything; each fork kills itself at one of its steps."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable

# Calls that open, rename, remove or make a file: the steps at which what is on disk can be torn.
STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def print_exit_codes(work: Callable[[], object], out: str, steps: Iterable[str]) -> None:
    """Run ``work`` in a fork for each of ``steps``, killed at its n-th step in ``out``; print how each has ended."""
    for step in map(int, steps):
        child = os.fork()
        if child == 0:
            _kill_at(step, out)
            work()
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _kill_at(step: int, out: str) -> None:
    remaining = step

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal remaining
        if event in STEPS and out in str(arguments[0]):
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)

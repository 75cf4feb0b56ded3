"""Locks of builds that no longer run: torch takes one to compile an operator, and waits for another's without end.

Nothing of megatrain's own is compiled at a start; the key ``deepspeed`` of a config may ask for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil

LONGEST_SILENCE_SECONDS = 600.0
"""A build that has written nothing for so long is over, on whatever machine it ran."""


def clear_stale_locks(folder: Path) -> list[str]:
    """Remove locks in a folder of torch's extensions that a killed build has left; what was done or is to do, in words.

    A lock that a process of this machine holds is that of a live build. Others may be another machine's, where the
    folder is shared: such a lock goes once nothing is written beside it any more.
    """
    messages = []
    for lock in _locks(folder):
        try:
            if _is_held(lock):
                continue
            silent_seconds = time.time() - max(path.stat().st_mtime for path in (lock, *lock.parent.rglob("*")))
            if silent_seconds > LONGEST_SILENCE_SECONDS:
                lock.unlink()
                messages.append(
                    f"{lock} was removed: a build that was killed had left it, and this start would have waited"
                )
            else:
                messages.append(
                    f"{lock} is the lock of a build that no process of this machine makes. If it does not run on "
                    "another, remove that file: whoever needs the operator waits for it without end"
                )
        except OSError:  # it has just gone, or is not ours
            continue
    return messages


def _locks(folder: Path) -> Iterator[Path]:
    """Of each operator; torch puts another folder between for each version of Python and CUDA, unless told where."""
    for pattern in ("*/lock", "*/*/lock"):
        yield from sorted(folder.glob(pattern))


def _is_held(lock: Path) -> bool:
    """Whether a process of this user on this machine has it open, as torch keeps it while it builds."""
    for process in psutil.process_iter():
        try:
            if any(opened.path == str(lock.resolve()) for opened in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False

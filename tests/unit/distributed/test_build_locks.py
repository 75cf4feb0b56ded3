"""Locks of torch's builds, left behind or held by a process that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatrain.distributed.build_locks import LONGEST_SILENCE_SECONDS, clear_stale_locks

BUILDER = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(600)"


@contextmanager
def building(lock: Path) -> Iterator[None]:
    """A process that has taken the lock as torch's FileBaton does, and is killed in the middle."""
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def age(folder: Path) -> None:
    """As if nothing had been written there for a while."""
    then = time.time() - LONGEST_SILENCE_SECONDS - 10
    for path in folder.iterdir():
        os.utime(path, (then, then))


def test_only_a_killed_builds_lock_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "some_operator" / "lock"
    with building(lock):
        age(lock.parent)
        assert clear_stale_locks(tmp_path) == []
    assert lock.exists()
    (told,) = clear_stale_locks(tmp_path)
    assert told.startswith(f"{lock} was removed")
    assert not lock.exists()


def test_another_machines_lock_is_reported_and_stays(tmp_path: Path) -> None:
    lock = tmp_path / "some_operator" / "lock"
    with building(lock):
        pass
    (told,) = clear_stale_locks(tmp_path)
    assert told.startswith(f"{lock} is the lock of a build that no process of this machine makes")
    assert lock.exists()
    age(lock.parent)
    (lock.parent / "build.ninja").touch()
    assert "no process of this machine" in clear_stale_locks(tmp_path)[0]


def test_a_folder_without_builds_says_nothing(tmp_path: Path) -> None:
    assert clear_stale_locks(tmp_path / "none") == []

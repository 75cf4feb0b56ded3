"""Who may have a run folder: one job; its own later start; whoever comes after a death."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import orjson
import pytest

from megatrain.checkpoint import lock
from megatrain.checkpoint.lock import locked, refuse_if_locked
from megatrain.errors import CheckpointError, Superseded

FIRST = {"host": "node7", "pid": "4711", "slurm_job": "99"}
OTHER = {"host": "node8", "pid": "1", "slurm_job": "100"}


def _hold(run_dir: Path, job: Mapping[str, str], held: Event) -> None:
    with locked(run_dir, job):
        held.set()
        signal.pause()


@contextmanager
def _held(run_dir: Path, job: Mapping[str, str] = FIRST) -> Iterator[int]:
    """Another process holds the folder; its pid."""
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(run_dir, job, held), daemon=True)
    holder.start()
    try:
        assert held.wait(60)
        assert holder.pid is not None
        yield holder.pid
    finally:
        holder.kill()
        holder.join()


def _claim_another_machine(run_dir: Path) -> None:
    """From here on the holder seems to run on another machine, where its file lock may not be seen."""
    path = run_dir / ".lock"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "machine": "another"}))


def test_a_held_folder_is_refused_naming_the_holder(tmp_path: Path) -> None:
    with _held(tmp_path / "run") as pid:
        with pytest.raises(CheckpointError, match=r"run is in use by host node7, pid 4711, slurm job 99: stop that"):
            refuse_if_locked(tmp_path / "run", OTHER)
        os.kill(pid, signal.SIGSTOP)  # it stands still, and lives
        with pytest.raises(CheckpointError, match=r"in use by host node7"), locked(tmp_path / "run", OTHER):
            pass
        os.kill(pid, signal.SIGKILL)
        refuse_if_locked(tmp_path / "run", OTHER)  # at once, though it takes a moment to die


@pytest.mark.slow
def test_a_later_start_takes_over_from_an_earlier(tmp_path: Path) -> None:
    with locked(tmp_path, FIRST) as earlier:
        with pytest.raises(CheckpointError, match="in use"):
            refuse_if_locked(tmp_path, FIRST)  # not later: the same
        with locked(tmp_path, {**FIRST, "host": "node9", "slurm_restarts": "1"}) as later:
            time.sleep(1.1)
            with pytest.raises(Superseded, match="taken over by host node9, pid 4711"):
                earlier.check()
            later.check()
            with pytest.raises(CheckpointError, match="in use by host node9"):
                refuse_if_locked(tmp_path, OTHER)
        earlier.end()
    refuse_if_locked(tmp_path, OTHER)


def test_an_active_holder_elsewhere_is_respected(tmp_path: Path) -> None:
    with _held(tmp_path):
        _claim_another_machine(tmp_path)
        with pytest.raises(CheckpointError, match="in use by host node7"):
            refuse_if_locked(tmp_path, OTHER)


@pytest.mark.slow
def test_an_idle_holder_elsewhere_loses_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 3.0)
    with _held(tmp_path) as pid:
        _claim_another_machine(tmp_path)
        os.kill(pid, signal.SIGSTOP)  # its file lock stays: the server has not noticed its death
        with locked(tmp_path, OTHER), pytest.raises(CheckpointError, match="in use by host node8"):
            refuse_if_locked(tmp_path, FIRST)


def test_looking_and_leaving_leave_no_holder_behind(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "run", FIRST)
    with locked(tmp_path / "run", FIRST):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock-change"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name} cannot be made"):
        refuse_if_locked(tmp_path / name, FIRST)

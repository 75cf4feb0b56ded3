from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from megatrain.checkpoint.lock import locked, refuse_if_locked
from megatrain.errors import CheckpointError


def _hold(run_dir: Path, held: Event) -> None:
    with locked(run_dir, {"host": "node7", "pid": "4711", "slurm_job": "99"}):
        held.set()
        signal.pause()


def test_a_held_folder_is_refused_by_its_holders_name_until_the_holder_dies(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "run", held))
    holder.start()
    assert held.wait(60)
    with pytest.raises(CheckpointError, match=r"run is in use by host node7, pid 4711, slurm job 99: stop that run"):
        refuse_if_locked(tmp_path / "run")
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    refuse_if_locked(tmp_path / "run")


def test_looking_leaves_no_holder_behind(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{name} cannot be made"):
        refuse_if_locked(tmp_path / name)

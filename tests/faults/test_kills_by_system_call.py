"""A save killed before each of its system calls, and a power loss after each: the newest good checkpoint stays newest.

strace counts and kills; it stands outside of the process, so that nothing in it can be prepared for this.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import PosixStore
from megatrain.errors import CheckpointError
from tests.faults.replay import Disk
from tests.faults.traced_save import fragments, save

LOSSES = {  # of a power loss, beside the contents that were not synced; the number is for ``Disk.write``
    "all names that were not synced": None,
    "no names": 0,
    "new names of checkpoints, but not which of their files have gone": 2,
}
CHANGING = ("mkdir", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt-get install strace)"),
]


class Forks:
    """The process that forks one for each save."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.traced_save"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, command: str, folder: Path, *strace: str) -> int:
        """Do it under strace; the exit code of what was traced, negative for a signal."""
        go = folder.parent / "go"
        if not go.exists():
            os.mkfifo(go)
        self._stdin.write(f"{command} {folder}\n")
        self._stdin.flush()
        pid = self._stdout.readline().strip()
        tracer = subprocess.Popen(["strace", "-f", "-p", pid, *strace], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        go.write_bytes(b"!")
        code = int(self._stdout.readline())
        tracer.communicate()
        return code

    def close(self) -> None:
        self._stdin.close()
        self._process.wait(60)

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    running = Forks()
    yield running
    running.close()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a good checkpoint of step 1, about to save step 2."""
    folder = tmp_path_factory.mktemp("ready") / "checkpoints"
    store = PosixStore(folder)
    store.open_generation()
    save(store, 1)
    return folder


def _check(folder: Path) -> int:
    """That what a reader sees is whole, with the values of its step; the newest step."""
    store = PosixStore(folder)
    newest = store.newest_good()
    assert newest is not None
    for found in store.list():
        assert found.problem is None
        assert verify(found.path)[0] == []
    reader = CheckpointReader(newest.path)
    for fragment in fragments(newest.step):
        assert reader.read(fragment.shard, fragment.kind).equal(fragment.data)
    return newest.step


def _check_next_start(folder: Path) -> None:
    """That the next start removes all rubbish, and can save."""
    store = PosixStore(folder)
    store.open_generation()
    hidden = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert [path.name for path in hidden] == [store.generation]
    assert list(hidden[0].iterdir()) == []
    before = _check(folder)
    assert save(store, 3) is not None
    assert _check(folder) == 3 > before


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["save", "start"])
def test_kills_leave_the_newest_good_checkpoint_newest(command: str, forks: Forks, ready: Path, tmp_path: Path) -> None:
    killed_at: list[str] = []
    steps = set()
    for call in CHANGING:
        for count in range(1, 1000):
            folder = tmp_path / f"{call}-{count}" / "checkpoints"
            shutil.copytree(ready, folder)
            (folder / next(ready.glob(".generation-*")).name / "step-00000009").mkdir()  # for a start to remove
            inject = f"inject={call}:signal=SIGKILL:when={count}"
            code = forks.run(command, folder, "-e", f"trace={call}", "-e", inject, "-o", "/dev/null")
            if code == 0:
                break
            assert code == -9
            killed_at.append(f"{call} {count}")
            steps.add(_check(folder))
            unfinished = [path for path in folder.glob(".generation-*/step-*") if path.name != "step-00000009"]
            assert len(unfinished) <= 1
            _check_next_start(folder)
        shutil.rmtree(tmp_path / f"{call}-{count}")
    if command == "save":
        assert {"mkdir 1", "write 10", "fsync 6", "rename 2"} <= set(killed_at), killed_at
        assert steps == {1, 2}
    else:
        assert {"mkdir 1", "rename 1", "fsync 1"} <= set(killed_at), killed_at


def _traced_save(forks: Forks, ready: Path, tmp_path: Path) -> tuple[Disk, list[str]]:
    """The disk before a save, and the save's system calls."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(ready, folder)
    before = shutil.copytree(folder, tmp_path / "before")
    trace = tmp_path / "trace"
    calls = "trace=openat," + ",".join(CHANGING)
    assert forks.run("save", folder, "-e", calls, "-y", "-xx", "-s", "1000000", "-o", str(trace)) == 0
    disk = Disk(folder.parent, before)
    return disk, trace.read_text().splitlines()


def test_power_loss_leaves_only_good_checkpoints(forks: Forks, ready: Path, tmp_path: Path) -> None:
    disk, calls = _traced_save(forks, ready, tmp_path)
    steps = []
    num_states = 0
    for line in calls:
        if not disk.apply(line):
            continue
        for unsynced_names_from in LOSSES.values():
            state = tmp_path / "state"
            disk.write(state, unsynced_names_from)
            steps.append(_check(state / "checkpoints"))
            shutil.rmtree(state)
            num_states += 1
    assert num_states > 40
    assert steps[0] == 1
    assert set(steps[-len(LOSSES) :]) == {2}  # once a save has ended, no power loss takes it back


def test_the_replay_notices_a_save_without_sync(forks: Forks, ready: Path, tmp_path: Path) -> None:
    disk, calls = _traced_save(forks, ready, tmp_path)
    for line in calls:
        if not re.search(r"\bfsync\(", line):
            disk.apply(line)
    disk.write(tmp_path / "state", unsynced_names_from=0)
    with pytest.raises(CheckpointError, match="none is good"):
        _check(tmp_path / "state" / "checkpoints")

"""One command and the folder that it writes: begun once, gone on with after a kill, finished once.

Any number of processes may run it, on one machine or on many that share the folder: each does what no other has done or
is doing, and waits for the rest.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import orjson

from data_tools.executors import Advance, Progress
from data_tools.inputs import InputFile
from data_tools.locks import WorkLocks, join_command
from data_tools.origin import Origin
from data_tools.outputs import refuse_occupied
from data_tools.ranks import Ranks
from data_tools.units import PART_BYTES
from data_tools.work import run_tasks
from megatrain.atomic import commit_bytes
from megatrain.data.format import canonical_json
from megatrain.errors import ConfigError

REPORT_FOLDER = ".report"
"""Hidden, so that a command which reads the folder finds documents only."""
REPORT_FILE = "report.json"
WORK_FOLDER = ".work"
COMMAND_FILE = "command.json"
INPUTS_FILE = "inputs"
"""Names the files that what is in the work folder was made of."""
ATTRIBUTES_FOLDER = "attributes"
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.05, 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How the work is done, which changes no byte of the result."""

    num_workers: int
    progress: Progress
    ranks: Ranks
    part_bytes: int = PART_BYTES
    """About how much text is read between two commits."""
    say: Callable[[str], None] = field(default=lambda _: None, kw_only=True)
    """Called with a line about the inputs."""


@dataclass(frozen=True)
class Task(Generic[T]):
    """A piece of work, done when its file `done` is there. `num_bytes`: about how much it reads, for progress."""

    done: Path
    num_bytes: int
    work: T


class Job:
    """The work of one command, shared by all processes that run it."""

    def __init__(self, work: Path, effort: Effort) -> None:
        self.work = work
        self.effort = effort
        self.locks = WorkLocks(work / "claims")

    def run(self, name: str, function: Callable[[T, Advance], None], tasks: Sequence[Task[T]]) -> None:
        """Call the function for the work of every task; return when all are done, here or in other processes."""
        run_locked = partial(_run_locked, function, self.locks)
        ranks, poll_seconds = self.effort.ranks, MIN_POLL_SECONDS
        while pending := _pending(tasks):
            # A share at a time, from another place on each rank; then a look at what is left.
            size = -(-len(pending) // ranks.size)
            begin = size * ranks.rank % len(pending)
            share = (pending + pending)[begin : begin + size]
            with self.effort.progress(name, sum(task.num_bytes for task in share)) as advance:
                run_tasks(run_locked, share, self.effort.num_workers, advance)
            if any(task.done.exists() for task in share):
                poll_seconds = MIN_POLL_SECONDS
            else:
                time.sleep(poll_seconds)
                poll_seconds = min(2 * poll_seconds, MAX_POLL_SECONDS)

    def run_in_one(self, name: str, function: Callable[[], None], done: Path) -> None:
        """Have one of the processes call the function."""
        while not done.exists():
            with self.locks.try_lock(name) as acquired:
                if acquired and not done.exists():
                    function()
            if not done.exists():
                time.sleep(MIN_POLL_SECONDS)

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, as plain data, made once and stored for all processes."""
        path = self.work / f"{name}.json"
        self.run_in_one(name, lambda: commit_bytes(path, orjson.dumps(make())), path)
        return orjson.loads(path.read_bytes())


def _pending(tasks: Sequence[Task[T]]) -> list[Task[T]]:
    """The tasks that are not done: one look at each folder instead of one for each file."""
    folders = {task.done.parent for task in tasks}
    there = {entry.path for folder in folders for entry in os.scandir(folder)}
    return [task for task in tasks if str(task.done) not in there]


def _run_locked(function: Callable[[T, Advance], None], locks: WorkLocks, task: Task[T], advance: Advance) -> None:
    """Do a task unless it is done, or another process is doing it."""
    with locks.try_lock(str(task.done)) as acquired:
        if acquired and not task.done.exists():
            function(task.work, advance)


def run_once(
    out: Path,
    command: dict[str, Any],
    files: list[InputFile],
    restart: bool,
    effort: Effort,
    make: Callable[[Job], dict[str, Any]],
) -> dict[str, Any]:
    """Have `make` called, unless this very command is done; gives its report, in both cases.

    `make` keeps in the job's folder what it needs again after a kill. It returns the report, and when
    that is stored the command is done. Raises ConfigError where `out` holds anything else.
    """
    origin = Origin(command, files)
    work, report_path = out / WORK_FOLDER, out / REPORT_FOLDER / REPORT_FILE
    if restart and effort.ranks.size > 1 and not effort.ranks.uses_mpi:
        raise ConfigError("--restart is for one process, or for ranks that speak MPI: others remove the folder first.")
    effort.ranks.share(lambda: _begin(out, work, restart, report_path, origin))
    if report_path.exists() and not work.exists():
        return _finished(out, report_path, origin)
    job = Job(work, effort)
    try:
        while not job.locks.join():
            _begin(out, work, False, report_path, origin)
        if not report_path.exists():
            if (work / INPUTS_FILE).read_text() != origin.versions:
                raise ConfigError(f"Another process is writing {out} just now, of inputs that have changed. Stop it.")
            report = canonical_json({**make(job), "job": origin.name})
            job.run_in_one("report", lambda: commit_bytes(report_path, report, work), report_path)
        result = _finished(out, report_path, origin)
        effort.ranks.wait()
        if job.locks.leave():
            shutil.rmtree(work, ignore_errors=True)
    finally:
        job.locks.close()
    return result


def _begin(out: Path, work: Path, restart: bool, report_path: Path, origin: Origin) -> None:
    """Make the folder ready for this command, or find that it is."""
    if restart:
        _clear(out)
    if report_path.exists() and not work.exists():
        return
    refuse_occupied(out, work)
    work.mkdir(parents=True, exist_ok=True)
    if not report_path.exists():
        join_command(out, work / COMMAND_FILE, origin.command, "--restart to start over")
        inputs = work / INPUTS_FILE
        if inputs.exists() and inputs.read_text() != origin.versions:
            # Attributes are kept: their names tell of which files they are, and in which version.
            _clear(out, {COMMAND_FILE, ATTRIBUTES_FOLDER, INPUTS_FILE})
        commit_bytes(inputs, origin.versions.encode())


def _finished(out: Path, report_path: Path, origin: Origin) -> dict[str, Any]:
    report: dict[str, Any] = orjson.loads(report_path.read_bytes())
    way_out = "Give another --out, or --restart to replace it."
    origin.refuse_other(report["job"], report_path, f"{out} already holds a result", way_out)
    return report


def _clear(out: Path, kept: Collection[str] = ()) -> None:
    """Remove what a command of this kind has written to the folder, and nothing else; `kept`: of the work folder."""
    if not (out / WORK_FOLDER).is_dir() and not (out / REPORT_FOLDER / REPORT_FILE).is_file():
        return
    locks = WorkLocks(out / WORK_FOLDER / "claims")
    try:
        if (out / WORK_FOLDER).is_dir() and not locks.is_only_member():
            raise ConfigError(f"Another process is writing {out} just now. Stop it first.")
    finally:
        locks.close()
    # The report goes last: a kill in between leaves a folder that is still known as ours.
    if kept:
        for path in (out / WORK_FOLDER).iterdir():
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path)
            elif path.name not in kept and not path.name.startswith("claims"):
                path.unlink()
    else:
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    for path in out.glob("part-*.jsonl.zst"):
        path.unlink()
    shutil.rmtree(out / REPORT_FOLDER, ignore_errors=True)

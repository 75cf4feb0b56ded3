"""A job is stages of numbered units; an executor runs the units; neither carries correctness.

A unit reads its inputs and commits one file by rename, under a name that follows from the unit. It does nothing if that
file is there. So a unit may run twice, anywhere, and the bytes are the same. What is sent to a worker is the path of
the stage's specification and the unit's number; the specification is a file, named after its content.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa

from data_tools.executors import (
    Advance,
    LocalPool,
    Place,
    Progress,
    Share,
    Unfinished,
    limit_threads,
    run_all,
    worker_advance,
)
from data_tools.memory import NO_BOUND, Memory
from data_tools.units import PART_BYTES
from megatrain.atomic import commit_bytes, commit_first
from megatrain.errors import DataError, RankError

LOOK_AGAIN_SECONDS = 30.0
"""How long a file that another node has committed may take to be seen over NFS."""
ANY_WORKERS = 1 << 20
SCHEMA = pa.schema({"record": pa.large_binary()})

T = TypeVar("T")
Run = Callable[[int, Advance], None]


@dataclass(frozen=True)
class Stage:
    """Units that need nothing of each other. `commit` and `run` of several go to workers: picklable, and small."""

    name: str
    num_bytes: Sequence[int]
    """About what each unit reads, for progress: as many as there are units."""
    commit: Callable[[int], Path]
    """The file that a unit commits last."""
    run: Run
    max_workers: int = ANY_WORKERS
    """More workers would cost more to start than they bring."""

    def missing(self) -> list[int]:
        """The units whose commit is not there, one of those with the same: one look at each folder."""
        paths = {self.commit(number): number for number in reversed(range(len(self.num_bytes)))}
        there = {folder: committed_names(folder) for folder in {path.parent for path in paths}}
        return sorted(number for path, number in paths.items() if path.name not in there[path.parent])


def one_unit(name: str, path: Path, make: Callable[[], None]) -> Stage:
    """A stage of one unit, which commits `path` by calling `make`, in the process that coordinates."""
    return Stage(name, [0], lambda number: path, lambda number, advance: make())


def committed_names(folder: Path) -> set[str]:
    """The files of a folder. A listing: to look for one name that is not there yet hides it on NFS, once it is."""
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


class Records:
    """Values by number in one mapped file: a worker reads those it needs, however many there are."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, number: int) -> Any:
        return orjson.loads(self._column[number].as_py())

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __reduce__(self) -> tuple[type[Records], tuple[Path]]:
        return Records, (self._path,)

    @property
    def _column(self) -> pa.Array:
        return _record_column(self._path)

    @staticmethod
    def write(path: Path, values: Iterable[object]) -> Records:
        """Commit the values, unless another process has done that first."""
        array = pa.array([orjson.dumps(value) for value in values], pa.large_binary())
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(pa.record_batch([array], schema=SCHEMA))
        commit_first(path, sink.getvalue())
        return Records(path)


@lru_cache(4)
def _record_column(path: Path) -> pa.Array:
    return open_committed(path).get_batch(0)["record"]


def open_committed(path: Path) -> Any:
    """A reader of an Arrow file of the work, mapped."""
    return pa.ipc.open_file(map_committed(path))


def map_committed(path: Path) -> pa.MemoryMappedFile:
    """A file of the work, mapped. Raises FileNotFoundError that names it, as `when_seen` needs it."""
    try:
        return pa.memory_map(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error


def when_seen(folder: Path, action: Callable[[], T]) -> T:
    """Do what reads committed files, and again for a bounded time where one is not there: NFS shows it late.

    Not where the `folder` of the work is gone: another process has finished it.
    """
    deadline = math.inf
    while True:
        try:
            return action()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE) or time.monotonic() > deadline or not folder.is_dir():
                raise
            deadline = min(deadline, time.monotonic() + LOOK_AGAIN_SECONDS)
            if error.filename:
                committed_names(Path(os.fsdecode(error.filename)).parent)  # a listing makes NFS look again
        time.sleep(0.25)


@dataclass(frozen=True)
class Effort:
    """How the work is done, which changes no byte of the result."""

    num_workers: int
    """Local processes, where `place` is not given."""
    progress: Progress
    part_bytes: int = PART_BYTES
    """About how much text is read between two commits."""
    say: Callable[[str], None] = field(default=lambda _: None, kw_only=True)
    """Called with a line about the inputs, or the share that is done."""
    place: Place | None = field(default=None, kw_only=True)
    stage: str | None = field(default=None, kw_only=True)
    """The one to run alone; those before it must be done."""

    @property
    def memory(self) -> Memory:
        """What each process may hold."""
        return NO_BOUND if self.place is None else self.place.memory

    @property
    def max_workers(self) -> int:
        """All that share the work, on all machines."""
        if self.place is None:
            return self.num_workers
        return self.place.pool.count * (self.place.share.count if self.place.share else 1)


def run_stages(stages: Iterable[Stage], folder: Path, effort: Effort) -> bool:
    """Run what is missing of each stage in turn; the specifications go to `folder`. Whether all are done.

    A stage is asked for once those before it are done. With a share: this process's units of the first stage that has
    some missing, and no more. Raises Unfinished where units are missing that other processes were to run.
    """
    if effort.place is None:
        with LocalPool(effort.num_workers) as pool:
            return _run_stages(stages, folder, effort, Place(pool))
    return _run_stages(stages, folder, effort, effort.place)


def _run_stages(stages: Iterable[Stage], folder: Path, effort: Effort, place: Place) -> bool:
    is_done_alone = False
    for stage in stages:
        if is_done_alone:
            return False
        missing = stage.missing()
        if effort.stage is not None and stage.name != effort.stage:
            if missing and (missing := _look_again(stage)):
                raise Unfinished(
                    f"{len(missing)} of {len(stage.num_bytes)} units of the stage {stage.name!r} are missing: start "
                    "the tasks that are to run them again."
                )
            continue
        if place.share is None:
            _run_units(stage, missing, folder, effort, place)
        elif missing or effort.stage is not None:
            own = share_of(place.share, stage, missing, folder)
            _run_units(stage, own, folder, effort, place)
            effort.say(f"{stage.name}: {place.share.name} is done, {len(own)} units.")
            return False
        is_done_alone = effort.stage is not None
    return True


def share_of(share: Share, stage: Stage, missing: Sequence[int], folder: Path) -> list[int]:
    """The missing units that are this process's: by number, or by their place among those that were missing first."""
    units: Sequence[int] = range(len(stage.num_bytes))
    if share.job:
        path = folder / f"share-{stage.name}-{share.job}.json"
        commit_first(path, orjson.dumps(missing))
        units = orjson.loads(path.read_bytes())
    return sorted(set(units[share.index :: share.count]) & set(missing))


def _run_units(stage: Stage, numbers: Sequence[int], folder: Path, effort: Effort, place: Place) -> None:
    """Return once all of these units have committed. The first error is raised here."""
    for parent in {stage.commit(number).parent for number in numbers}:
        parent.mkdir(parents=True, exist_ok=True)  # here alone: a unit that comes too late makes no folder again
    num_workers = min(place.pool.count, len(numbers), stage.max_workers)
    with effort.progress(stage.name, sum(stage.num_bytes[number] for number in numbers)) as advance:
        if num_workers <= 1:
            for number in numbers:
                when_seen(folder, partial(_run_if_missing, stage.commit, stage.run, number, advance))
            return
        run = partial(run_unit, str(write_stage(folder, stage)))
        for number, _ in run_all(place.pool, run, numbers, num_workers, advance):
            if place.pool.num_read is None:
                advance(stage.num_bytes[number])


def _look_again(stage: Stage) -> list[int]:
    deadline = time.monotonic() + LOOK_AGAIN_SECONDS
    while (missing := stage.missing()) and time.monotonic() < deadline:
        time.sleep(1)
    return missing


def write_stage(folder: Path, stage: Stage) -> Path:
    """Commit what the workers need of a stage; the name tells the content, which is checked before it is used."""
    content = pickle.dumps((str(Path.cwd()), code_version(), pickle.dumps((stage.commit, stage.run))))
    path = (folder / f"stage-{hashlib.sha256(content).hexdigest()}").absolute()
    commit_bytes(path, content)
    return path


@lru_cache(4)
def _load_stage(path: Path) -> tuple[str, Callable[[int], Path], Run]:
    content = path.read_bytes()
    if path.name != f"stage-{hashlib.sha256(content).hexdigest()}":
        raise DataError(f"{path} is damaged: its name does not fit its content. Start the same command again.")
    limit_threads(1)
    working_folder, version, stage = pickle.loads(content)
    if version != code_version():
        raise RankError(
            f"The worker on {socket.gethostname()} has {code_version()}, the command {version}: install the same there."
        )
    return working_folder, *pickle.loads(stage)


@cache
def code_version() -> str:
    """Python's version, and a digest of the code that decides what a unit commits."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"Python {platform.python_version()}, pyarrow {pa.__version__}, data_tools {digest.hexdigest()[:8]}"


def run_unit(path: str, number: int) -> None:
    """What a worker is sent: to run the unit of this number of the stage with this specification, if it is missing."""
    when_seen(Path(path).parent, partial(_run_unit, Path(path), number))


def _run_unit(path: Path, number: int) -> None:
    working_folder, commit, run = _load_stage(path)
    if str(Path.cwd()) != working_folder:
        os.chdir(working_folder)  # inputs have the names that the user gave them
    _run_if_missing(commit, run, number, worker_advance.get())


def _run_if_missing(commit: Callable[[int], Path], run: Run, number: int, advance: Advance) -> None:
    path = commit(number)
    if path.name not in committed_names(path.parent):
        run(number, advance)

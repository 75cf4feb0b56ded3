"""Work that survives: parts committed one by one into a folder, by any number of worker processes.

A part's file name depends on its unit alone (its input files, their versions, the range), never on who made it or when.
So whoever runs the same command again finds what is there, and does the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
import pyarrow as pa

from data_tools.units import Unit
from megatrain.data.format import commit_bytes, committed
from megatrain.errors import MegatrainError, RankError

Task = TypeVar("Task")
Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a display for work of a name and a size; gives the function that hears of what was done."""


class PartFile(NamedTuple):
    """A part that is done, and what it holds: all that is to be known of it until its documents are moved."""

    path: Path
    num_rows: int
    num_empty: int
    num_documents: int
    num_tokens: int
    unknown: dict[str, Any]
    """Fields of `Unknown`."""
    num_skipped: int
    skipped: list[tuple[int, int, str]]
    """File of the unit, row in the part, and problem of rows that were skipped: see `Part.batches`."""


def write_batches(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], scratch: Path | None = None
) -> None:
    """Write an Arrow file: whole, or not at all. `scratch`: see `committed`."""
    with committed(path, scratch) as unfinished, pa.ipc.new_file(str(unfinished), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@dataclass(frozen=True)
class PartStore:
    """The parts that are done, in one folder."""

    folder: Path

    @property
    def plan_path(self) -> Path:
        """Where the plan of shards is written down once all units are finished; parts may be deleted after that."""
        return self.folder / "plan.json"

    def part_path(self, unit: Unit, number: int) -> Path:
        """Where part `number` of a unit is, or will be."""
        return self.folder / f"{unit.key}-{number:06d}.arrow"

    def finish_unit(self, unit: Unit, numbers: list[int]) -> None:
        """Record that the unit consists of these parts, all of which are committed, and what they hold."""
        schemas = [pa.ipc.open_file(str(self.part_path(unit, number))).schema for number in numbers]
        counts = [orjson.loads(schema.metadata[b"megatrain"]) for schema in schemas]
        commit_bytes(self.marker(unit), orjson.dumps(list(zip(numbers, counts, strict=True))))

    def names(self) -> set[str]:
        """The files that are there now: one look at the folder instead of one for each file."""
        return {entry.name for entry in os.scandir(self.folder)}

    def is_finished(self, unit: Unit, names: set[str]) -> bool:
        """Whether the unit is recorded as finished and its parts are among the files `names`."""
        marker = self.marker(unit)
        return marker.name in names and all(part.path.name in names for part in self.parts(unit))

    def parts(self, unit: Unit) -> list[PartFile]:
        """The parts of a finished unit, in order."""
        return [PartFile(self.part_path(unit, number), **counts) for number, counts in self.listed(unit)]

    def listed(self, unit: Unit) -> list[tuple[int, dict[str, Any]]]:
        """The numbers of a finished unit's parts, and what was counted in each."""
        parts: list[tuple[int, dict[str, Any]]] = orjson.loads(self.marker(unit).read_bytes())
        return parts

    def marker(self, unit: Unit) -> Path:
        """Where it is recorded that the unit is finished."""
        return self.folder / f"{unit.key}.json"


def run_tasks(
    function: Callable[[Task, Advance], None], tasks: Iterable[Task], num_workers: int, advance: Advance
) -> None:
    """Call `function(task, advance)` for every task, in this process, or in `num_workers` new ones if that is above 1.

    A task is asked for when there is a worker for it. The first error ends all workers and is raised here. A worker
    that dies raises RankError. Workers end by themselves when this process does, however it does.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, num_workers))
    if len(first) <= 1:
        for task in chain(first, waiting):
            function(task, advance)
        return
    workers = [_Worker.start(function) for _ in first]
    try:
        for worker, task in zip(workers, first, strict=True):
            worker.send(task)
        busy = {worker.connection: worker for worker in workers}
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                kind, value = worker.receive()
                if kind == "advance":
                    advance(value)
                elif kind == "error":
                    raise value
                else:
                    for task in islice(waiting, 1):
                        worker.send(task)
                        break
                    else:
                        worker.connection.close()
                        del busy[worker.connection]
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: Connection

    @staticmethod
    def start(function: Callable[[Any, Advance], None]) -> _Worker:
        # Spawned, not forked: the encoders' threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def send(self, task: object) -> None:
        try:
            self.connection.send(task)
        except ConnectionError:
            raise self._death() from None

    def receive(self) -> tuple[str, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        return kind, value

    def _death(self) -> RankError:
        self.process.join()
        code = self.process.exitcode or 0
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RankError(
            f"A worker process {cause} in the middle of its work (out of memory?). Nothing half written was kept: "
            "run the same command again to go on, with fewer --workers if memory was short."
        )


def limit_threads(num_threads: int) -> None:
    """Bound the encoders' own thread pools, in a process that has not used them yet."""
    os.environ.update(RAYON_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="true" if num_threads > 1 else "false")


def _work(function: Callable[[Any, Advance], None], connection: Connection) -> None:
    """What a worker process does: one task after another, until its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            function(task, lambda amount: connection.send(("advance", amount)))
            message: tuple[str, Any] = ("done", None)
        except (MegatrainError, OSError) as error:
            message = ("error", error)
        except Exception:  # noqa: BLE001 (a bug: it crosses the process border as text)
            message = ("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
        connection.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

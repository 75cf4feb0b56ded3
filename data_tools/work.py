"""Work that survives: parts committed one by one into a folder, by any number of worker processes.

A part's file name depends on its unit alone (its input files, their versions, the range), never on which process made
it or when. So the same command, run again, finds what is there, and does the rest.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for_connections
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
import pyarrow as pa

from data_tools.units import Unit
from megatrain.atomic import commit_bytes, committed
from megatrain.errors import RankError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a display for work of a name and a size; yields the function that is given what was done."""

PROGRESS_SECONDS = 0.25
"""How often what worker processes have done is shown."""

_worker_function: ContextVar[Callable[[Any], Any]] = ContextVar("worker_function")
"""What a worker process calls for each task: it comes once, with the encoder that it builds."""


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
        return [PartFile(self.part_path(unit, number), **counts) for number, counts in self.listed(unit)]

    def listed(self, unit: Unit) -> list[tuple[int, dict[str, Any]]]:
        """The numbers of a finished unit's parts, and what was counted in each."""
        parts: list[tuple[int, dict[str, Any]]] = orjson.loads(self.marker(unit).read_bytes())
        return parts

    def marker(self, unit: Unit) -> Path:
        """Where it is recorded that the unit is finished."""
        return self.folder / f"{unit.key}.json"


def run_tasks(
    function: Callable[[Task, Advance], Result], tasks: Iterable[Task], num_workers: int, advance: Advance
) -> list[Result]:
    """Call `function(task, advance)` for every task, in this process, or in `num_workers` new ones if that is above 1.

    A task is asked for when there is a worker for it. The first error ends all workers and is raised here. A worker
    that dies raises RankError. Workers end by themselves when this process does, however it does.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, num_workers))
    if len(first) <= 1:
        return [function(task, advance) for task in chain(first, waiting)]
    context = get_context("spawn")  # the encoders' threads do not survive a fork
    num_done, num_shown = context.Value("q", 0), 0
    others, workers = set(active_children()), set[BaseProcess]()
    with ProcessPoolExecutor(len(first), context, _start_worker, (function, num_done)) as pool:
        try:
            futures = [pool.submit(_call, task) for task in first]
            running = set(futures)
            while running:
                workers |= set(active_children()) - others
                done, running = wait(running, PROGRESS_SECONDS, FIRST_COMPLETED)
                for future in done:
                    future.result()
                next_ones = [pool.submit(_call, task) for task in islice(waiting, len(done))]
                futures += next_ones
                running.update(next_ones)
                advance(num_done.value - num_shown)
                num_shown = num_done.value
        except BrokenProcessPool:
            raise _death(workers) from None
        finally:
            for worker in workers | (set(active_children()) - others):
                worker.terminate()
    return [future.result() for future in futures]


def _death(workers: Iterable[BaseProcess]) -> RankError:
    """What to say of the worker that died first; the pool ends all others with SIGTERM."""
    for worker in workers:
        worker.join()
    codes = {worker.exitcode or 0 for worker in workers} - {0, -signal.SIGTERM} or {-signal.SIGTERM}
    code = codes.pop()
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return RankError(
        f"A worker process {cause} in the middle of its work (out of memory?). Nothing half written was kept: "
        "run the same command again to go on, with fewer --workers if memory was short."
    )


def limit_threads(num_threads: int) -> None:
    """Bound the encoders' own thread pools, in a process that has not used them yet."""
    os.environ.update(RAYON_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="true" if num_threads > 1 else "false")


def _start_worker(function: Callable[[Any, Advance], Any], num_done: Synchronized[int]) -> None:
    """What a new worker process does before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit_threads(1)

    def advance(amount: int) -> None:
        with num_done.get_lock():
            num_done.value += amount

    _worker_function.set(lambda task: function(task, advance))


def _call(task: Any) -> Any:
    return _worker_function.get()(task)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait_for_connections([parent.sentinel])
        os._exit(1)

"""Work that survives: parts committed one by one into a folder, by any number of worker processes.

A part's file name depends on its unit alone (its input files, their versions, the range), never on which process made
it or when. So the same command, run again, finds what is there, and does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
import pyarrow as pa

from data_tools.executors import Advance, LocalPool, run_all, worker_advance
from data_tools.units import Unit
from megatrain.atomic import commit_bytes, committed

Task = TypeVar("Task")
Result = TypeVar("Result")


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

    The first error ends all workers and is raised here. A worker that dies raises RankError.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, num_workers))
    if len(first) <= 1:
        return [function(task, advance) for task in chain(first, waiting)]
    with LocalPool(len(first)) as pool:
        done = run_all(pool, partial(_call, function), enumerate(chain(first, waiting)), len(first), advance)
        return [result for _, result in sorted(((index, result) for (index, _), result in done), key=itemgetter(0))]


def _call(function: Callable[[Task, Advance], Result], task: tuple[int, Task]) -> Result:
    return function(task[1], worker_advance.get())

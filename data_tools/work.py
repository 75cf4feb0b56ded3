"""Work that survives: parts committed one by one into a folder, by any number of worker processes.

A part's file name depends on its unit alone (its input files, their versions, the range), never on which process made
it or when. So the same command, run again, finds what is there, and does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
import pyarrow as pa
import xxhash

from data_tools.executors import Advance, LocalPool, run_all, worker_advance
from data_tools.job import open_committed
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
    num_scored: int = 0
    examples: dict[str, int] = {}  # noqa: RUF012 (never written to)
    """See `Manifest.examples`."""
    labels: dict[str, int] = {}  # noqa: RUF012 (never written to)
    """Documents of each label."""


def write_batches(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], scratch: Path | None = None
) -> None:
    """Write an Arrow file: whole, or not at all. `scratch`: see `committed`."""
    with committed(path, scratch) as unfinished, pa.ipc.new_file(str(unfinished), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


@dataclass(frozen=True)
class PartStore:
    """The parts that are done, by their own names, in a folder or in `num_folders` below it."""

    folder: Path
    num_folders: int = 1

    def path(self, name: str) -> Path:
        if self.num_folders == 1:
            return self.folder / name
        return self.folder / f"{xxhash.xxh3_64_intdigest(name.encode()) % self.num_folders:03x}" / name

    def make_folders(self) -> None:
        for number in range(self.num_folders):
            folder = self.folder if self.num_folders == 1 else self.folder / f"{number:03x}"
            folder.mkdir(parents=True, exist_ok=True)

    def part_path(self, unit: Unit, number: int) -> Path:
        return self.path(f"{unit.key}-{number:06d}.arrow")

    def marker(self, unit: Unit) -> Path:
        """Where it is recorded which parts a unit has."""
        readers = f"-{unit.reader}of{unit.num_readers}" if unit.num_readers > 1 else ""
        return self.path(f"{unit.key}{readers}.json")

    def commit(self, unit: Unit) -> Path:
        """What is there when all of the unit is."""
        return self.part_path(unit, 0) if unit.is_one_part else self.marker(unit)

    def finish_unit(self, unit: Unit, numbers: list[int]) -> None:
        """Record that the unit consists of these parts, all of which are committed, and what they hold."""
        counts = [[number, _counts(self.part_path(unit, number))] for number in numbers]
        commit_bytes(self.marker(unit), orjson.dumps(counts))

    def parts(self, unit: Unit) -> list[PartFile]:
        return [PartFile(self.part_path(unit, number), **counts) for number, counts in self.listed(unit)]

    def listed(self, unit: Unit) -> list[tuple[int, dict[str, Any]]]:
        """The numbers of a finished unit's parts, and what was counted in each."""
        if unit.is_one_part:
            return [(0, _counts(self.part_path(unit, 0)))]
        parts: list[tuple[int, dict[str, Any]]] = orjson.loads(self.marker(unit).read_bytes())
        return parts


def _counts(path: Path) -> dict[str, Any]:
    counts: dict[str, Any] = orjson.loads(open_committed(path).schema.metadata[b"megatrain"])
    return counts


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

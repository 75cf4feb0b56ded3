"""Writing the documents that stay: .jsonl.zst with the keys that Dolma and datatrove use, and a list of the others.

A document keeps all keys of its record. `text`, `id`, `source` and `metadata.provenance` (the file and row that it was
first read from) are there in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import zstandard

from data_tools.clean.attributes import Corpus, Documents, Location, TaggedPart
from data_tools.clean.job import REPORT_FOLDER, Job, Task
from data_tools.executors import Advance
from data_tools.readers import read_parts
from data_tools.units import Part, ReadOptions, Record, Unit, as_text
from data_tools.work import write_batches
from megatrain.atomic import commit_bytes, committed
from megatrain.errors import DataError

TASK_BYTES = 1 << 28
"""About how much input makes one list of dropped documents."""
PARTS_PER_FILE = 16
EXCERPT_CHARACTERS = 4000

DROPPED_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "file": pa.string(),
        "row": pa.uint64(),
        "reason": pa.string(),
        "kept_id": pa.string(),
        "kept_file": pa.string(),
        "kept_row": pa.uint64(),
    }
)
"""The list of dropped documents; the last three are null where no other is kept instead."""


class Decisions(NamedTuple):
    """What is to be done with the documents of a part."""

    reasons: list[str | None]
    """Why each is dropped; None if it is kept."""
    kept: Documents | None
    """For each that is dropped the number of the document that is kept instead, if there is such a thing."""


Decide = Callable[[TaggedPart], Decisions]
"""Goes to other processes, so it is to be picklable."""


class OutputTask(NamedTuple):
    """Some units, one after another, and the parts of each."""

    number: int
    units: list[tuple[Unit, list[TaggedPart]]]


@dataclass(frozen=True)
class OutputWriter:
    """Commits the output files of tasks."""

    out: Path
    work: Path
    options: ReadOptions
    corpus: Corpus
    decide: Decide
    examples: set[int]
    """Documents whose text the report shows."""

    def list_path(self, number: int) -> Path:
        return self.out / REPORT_FOLDER / f"dropped-{number:06d}.arrow"

    def __call__(self, task: OutputTask, advance: Advance) -> None:
        """Write the files of the task that are not there yet, and then the list of what was dropped."""
        numbered = enumerate(_parts(task, self.options, advance))
        for file, parts in groupby(numbered, lambda each: each[0] // PARTS_PER_FILE):
            path = self.out / f"part-{task.number:06d}-{file:06d}.jsonl.zst"
            if not path.exists():
                self._write_file(path, (part for _, part in parts))
        lists = (self._dropped(part) for _, parts in task.units for part in parts)
        write_batches(self.list_path(task.number), DROPPED_SCHEMA, lists, self.work)

    def _write_file(self, path: Path, parts: Iterable[tuple[TaggedPart, Part]]) -> None:
        excerpts: dict[str, str] = {}
        compressor = zstandard.ZstdCompressor(level=3)
        # One frame a file: some readers, datatrove's among them, stop at the end of the first.
        with (
            committed(path, self.work) as unfinished,
            unfinished.open("wb") as raw,
            compressor.stream_writer(raw, closefd=False) as file,
        ):
            for tagged, part in parts:
                reasons = self.decide(tagged).reasons
                records = ((row, record) for row, record in part.rows if isinstance(record, Record))
                for index, (row, record) in enumerate(records):
                    document = tagged.first_document + index
                    if document in self.examples:
                        excerpts[str(document)] = record.text[:EXCERPT_CHARACTERS]
                    if reasons[index] is None:
                        location = self.corpus.location(tagged, record.id, record.file, row)
                        file.write(_line(record, location))
            if excerpts:
                commit_bytes(self.work / f"examples-{path.stem}.json", orjson.dumps(excerpts))

    def _dropped(self, part: TaggedPart) -> pa.RecordBatch:
        reasons, kept = self.decide(part)
        indices = [index for index, reason in enumerate(reasons) if reason is not None]
        locations = self.corpus.locations_in(part, pa.array(indices, pa.uint64()))
        kept_locations: list[Location] | list[None] = [None] * len(indices)
        if kept is not None:
            numbers, inverse = np.unique(kept[indices], return_inverse=True)
            found = self.corpus.locations(numbers)
            kept_locations = [found[index] for index in inverse.tolist()]
        columns = [
            *([location[i] for location in locations] for i in range(3)),
            [reasons[index] for index in indices],
            *([location and location[i] for location in kept_locations] for i in range(3)),
        ]
        arrays = [pa.array(values, each.type) for values, each in zip(columns, DROPPED_SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=DROPPED_SCHEMA)


def _line(record: Record, location: Location) -> bytes:
    extra = dict(record.extra)
    metadata = extra.pop("metadata", {})
    if not isinstance(metadata, dict):
        metadata = {"metadata": metadata}  # as datatrove does
    # The text may have stood under another key than `text`, and something else under that; so may the id.
    metadata = {**{key: extra.pop(key) for key in ("text", "id") if key in extra}, **metadata}
    metadata.setdefault("provenance", {"file": location.file, "row": location.row})
    source = extra.pop("source", location.file)
    written = {"text": record.text, "id": location.id, "source": source, **extra, "metadata": metadata}
    try:
        return orjson.dumps(written, default=as_text, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:
        raise DataError(
            f"{location.file}, row {location.row} (from 0): the record cannot be written again as JSON: {error}. "
            "Leave out or flatten what stands beside its text."
        ) from None


def _parts(task: OutputTask, options: ReadOptions, advance: Advance) -> Iterator[tuple[TaggedPart, Part]]:
    for unit, tagged in task.units:
        yield from zip(tagged, read_parts(unit, options, advance), strict=True)


def _plan(corpus: Corpus) -> Iterator[tuple[int, OutputTask]]:
    """The units in groups of about TASK_BYTES, each with its bytes."""
    units: list[tuple[Unit, list[TaggedPart]]] = []
    number = num_bytes = 0
    for index, parts in groupby(corpus.parts, lambda part: part.unit):
        units.append((corpus.units[index], list(parts)))
        num_bytes += corpus.units[index].num_bytes
        if num_bytes >= TASK_BYTES:
            yield num_bytes, OutputTask(number, units)
            units, number, num_bytes = [], number + 1, 0
    if units:
        yield num_bytes, OutputTask(number, units)


def write_kept(
    corpus: Corpus, out: Path, options: ReadOptions, decide: Decide, examples: set[int], job: Job
) -> dict[int, str]:
    """Write all documents but the dropped; gives the beginnings of the examples' texts."""
    (out / REPORT_FOLDER).mkdir(exist_ok=True)
    writer = OutputWriter(out, job.work, options, corpus, decide, examples)
    tasks = [Task(writer.list_path(task.number), num_bytes, task) for num_bytes, task in _plan(corpus)]
    job.run("write", writer, tasks)
    excerpts: dict[int, str] = {}
    for path in sorted(job.work.glob("examples-*.json")):
        excerpts.update({int(key): text for key, text in orjson.loads(path.read_bytes()).items()})
    return excerpts

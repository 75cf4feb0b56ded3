"""Writing the documents that stay: .jsonl.zst with the keys that Dolma and datatrove use, and a list of the others.

A document keeps all keys of its record. `text`, `id`, `source` and `metadata.provenance` (the file and row that it was
first read from) are there in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import zstandard

from data_tools.clean.job import REPORT_FOLDER, Job, Task
from data_tools.clean.survey import Corpus, DocumentPlace, SurveyedPart, read_columns
from data_tools.readers import read_parts
from data_tools.units import Part, ReadOptions, Record, Unit, as_text
from data_tools.work import Advance, write_batches
from megatrain.data.format import commit_bytes, committed
from megatrain.errors import DataError

TASK_BYTES = 1 << 28
"""About how much input makes one list of dropped documents."""
PARTS_PER_FILE = 16
EXCERPT_CHARACTERS = 4000

DROPPED_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("id", "file")),
        pa.field("row", pa.uint64()),
        pa.field("reason", pa.string()),
        *(pa.field(name, pa.string()) for name in ("kept_id", "kept_file")),
        pa.field("kept_row", pa.uint64()),
    ]
)
"""What the list of dropped documents holds; the last three are null where no other is kept instead."""


Documents = npt.NDArray[np.uint64]


class PartDecisions(NamedTuple):
    """What is to be done with the documents of a part."""

    reasons: list[str | None]
    """Why each is dropped; None if it is kept."""
    kept: Documents | None
    """For each that is dropped the number of the document that is kept instead, if there is such a thing."""


class Decisions(Protocol):
    """What is to be done with each document of the input. Goes to other processes, so it is to be picklable."""

    def of(self, part: SurveyedPart) -> PartDecisions:
        """What is to be done with the documents of a part."""


class OutputTask(NamedTuple):
    """Some units, one after another, and the parts that the survey found in each."""

    number: int
    units: tuple[tuple[Unit, tuple[SurveyedPart, ...]], ...]

    @property
    def num_bytes(self) -> int:
        """About how much there is to be read."""
        return sum(unit.num_bytes for unit, _ in self.units)

    def list_path(self, out: Path) -> Path:
        """Where the list of what was dropped is, or will be."""
        return out / REPORT_FOLDER / f"dropped-{self.number:06d}.arrow"


class _OutputPart(NamedTuple):
    number: int
    """In the task."""
    unit: Unit
    surveyed: SurveyedPart
    part: Part


@dataclass(frozen=True)
class OutputWriter:
    """Commits the output files of tasks."""

    out: Path
    work: Path
    options: ReadOptions
    corpus: Corpus
    decisions: Decisions
    examples: frozenset[int]
    """Documents of which the report wants to see the text."""

    def __call__(self, task: OutputTask, advance: Advance) -> None:
        """Write the files of the task that are not there yet, and then the list of what was dropped."""
        for file, parts in groupby(_parts(task, self.options, advance), lambda each: each.number // PARTS_PER_FILE):
            path = self.out / f"part-{task.number:06d}-{file:06d}.jsonl.zst"
            if not path.exists():
                self._write_file(path, parts)
        lists = (self._dropped(part) for _, parts in task.units for part in parts)
        write_batches(task.list_path(self.out), DROPPED_SCHEMA, lists, self.work)

    def _write_file(self, path: Path, parts: Iterable[_OutputPart]) -> None:
        excerpts: dict[str, str] = {}
        compressor = zstandard.ZstdCompressor(level=3)
        # One frame a file: some readers, datatrove's among them, stop at the end of the first.
        with (
            committed(path, self.work) as unfinished,
            unfinished.open("wb") as raw,
            compressor.stream_writer(raw, closefd=False) as file,
        ):
            for each in parts:
                reasons = self.decisions.of(each.surveyed).reasons
                records = ((row, record) for row, record in each.part.numbered_rows() if isinstance(record, Record))
                for index, (row, record) in enumerate(records):
                    document = each.surveyed.first_document + index
                    if document in self.examples:
                        excerpts[str(document)] = record.text[:EXCERPT_CHARACTERS]
                    if reasons[index] is None:
                        file.write(self._line(each, row, record))
            if excerpts:
                commit_bytes(self.work / f"examples-{path.stem}.json", orjson.dumps(excerpts))

    def _line(self, each: _OutputPart, row: int, record: Record) -> bytes:
        place = self.corpus.place(each.surveyed, record.id, record.file, row)
        try:
            return orjson.dumps(make_record(record, place), default=as_text, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:
            raise DataError(
                f"{place.file}, row {place.row} (from 0): the record cannot be written again as JSON: {error}. "
                "Leave out or flatten what stands beside its text."
            ) from None

    def _dropped(self, part: SurveyedPart) -> pa.RecordBatch:
        decisions = self.decisions.of(part)
        indices = [index for index, reason in enumerate(decisions.reasons) if reason is not None]
        rows = read_columns(part.path, ["id", "file", "row"]).take(pa.array(indices, pa.uint64())).to_pylist()
        places = [self.corpus.place(part, row["id"], row["file"], row["row"]) for row in rows]
        kept: list[DocumentPlace] | list[None] = [None] * len(indices)
        if decisions.kept is not None:
            numbers, inverse = np.unique(decisions.kept[indices], return_inverse=True)
            found = self.corpus.places(numbers)
            kept = [found[index] for index in inverse.tolist()]
        columns = [
            *([place[i] for place in places] for i in range(3)),
            [decisions.reasons[index] for index in indices],
            *([place and place[i] for place in kept] for i in range(3)),
        ]
        arrays = [pa.array(values, each.type) for values, each in zip(columns, DROPPED_SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=DROPPED_SCHEMA)


def make_record(record: Record, place: DocumentPlace) -> dict[str, Any]:
    """The record as it is written."""
    extra = dict(record.extra)
    metadata = extra.pop("metadata", {})
    if not isinstance(metadata, dict):
        metadata = {"metadata": metadata}  # as datatrove does
    # The text may have stood under another key than `text`, and something else under that; so may the id.
    metadata = {**{key: extra.pop(key) for key in ("text", "id") if key in extra}, **metadata}
    metadata.setdefault("provenance", {"file": place.file, "row": place.row})
    return {
        "text": record.text,
        "id": place.id,
        "source": extra.pop("source", place.file),
        **extra,
        "metadata": metadata,
    }


def _parts(task: OutputTask, options: ReadOptions, advance: Advance) -> Iterator[_OutputPart]:
    number = 0
    for unit, surveyed in task.units:
        for part, known in zip(read_parts(unit, options, advance), surveyed, strict=True):
            yield _OutputPart(number, unit, known, part)
            number += 1


def plan_output(corpus: Corpus) -> list[OutputTask]:
    """The units in groups of about TASK_BYTES."""
    tasks: list[OutputTask] = []
    group: list[tuple[Unit, tuple[SurveyedPart, ...]]] = []
    num_bytes = 0
    for number, parts in groupby(corpus.parts, lambda part: part.unit):
        group.append((corpus.units[number], tuple(parts)))
        num_bytes += corpus.units[number].num_bytes
        if num_bytes >= TASK_BYTES:
            tasks.append(OutputTask(len(tasks), tuple(group)))
            group, num_bytes = [], 0
    if group:
        tasks.append(OutputTask(len(tasks), tuple(group)))
    return tasks


def write_kept(
    corpus: Corpus, out: Path, options: ReadOptions, decisions: Decisions, examples: Iterable[int], job: Job
) -> dict[int, str]:
    """Write all documents but the dropped; gives the beginnings of the examples' texts."""
    (out / REPORT_FOLDER).mkdir(exist_ok=True)
    writer = OutputWriter(out, job.work, options, corpus, decisions, frozenset(examples))
    job.run("write", writer, [Task(task.list_path(out), task.num_bytes, task) for task in plan_output(corpus)])
    excerpts: dict[int, str] = {}
    for path in sorted(job.work.glob("examples-*.json")):
        excerpts.update({int(key): text for key, text in orjson.loads(path.read_bytes()).items()})
    return excerpts

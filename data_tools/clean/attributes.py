"""Attributes of every document: what a tagger says of each, beside where the document stands; its text is not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from data_tools.clean.job import ATTRIBUTES_FOLDER, REPORT_FOLDER, Job, Task
from data_tools.executors import Advance
from data_tools.inputs import InputFile
from data_tools.readers import plan_units, read_parts
from data_tools.units import ReadOptions, Record, Unit
from data_tools.work import PartStore, write_batches
from megatrain.atomic import committed
from megatrain.data.format import SKIPPED_FILE, canonical_json

TAGGED_CHARACTERS = 1 << 20
"""About how much text a tagger is given at once."""

Documents = npt.NDArray[np.uint64]
Tagger = Callable[[list[str]], Mapping[str, pa.Array]]
"""Gives the attributes of some texts, as columns. Goes to other processes, so it is to be picklable."""


class Location(NamedTuple):
    """Where a document stands in the input."""

    id: str
    file: str
    row: int


class TaggedPart(NamedTuple):
    """The attributes of a part of the input, and how many rows and documents there are before it."""

    path: Path
    unit: int
    first_row: int
    """Row in the file at which the part begins."""
    first_document: int
    num_documents: int
    num_skipped: int


@dataclass(frozen=True)
class Corpus:
    """The documents of the whole input in order, by number, and their attributes."""

    units: Sequence[Unit]
    parts: Sequence[TaggedPart]

    @property
    def num_skipped(self) -> int:
        return sum(part.num_skipped for part in self.parts)

    @property
    def num_documents(self) -> int:
        """Documents in the input, empty ones too."""
        return self.parts[-1].first_document + self.parts[-1].num_documents if self.parts else 0

    def locations(self, documents: Documents) -> list[Location]:
        """Where documents stand, whose numbers are ascending."""
        starts = [part.first_document for part in self.parts]
        found = by_file(starts, documents)
        return [each for index, rows in found for each in self.locations_in(self.parts[index], rows)]

    def locations_in(self, part: TaggedPart, documents: pa.Array) -> list[Location]:
        """Where documents of a part stand, by their numbers in it."""
        rows = read_columns(part.path, ["id", "file", "row"]).take(documents).to_pylist()
        return [self.location(part, row["id"], row["file"], row["row"]) for row in rows]

    def location(self, part: TaggedPart, identity: str | None, file: int, row: int) -> Location:
        """Where a document of a part stands; its id, where the record had none, is `file:row`."""
        name = self.units[part.unit].files[file].name
        row += part.first_row
        return Location(f"{name}:{row}" if identity is None else identity, name, row)


def by_file(first_documents: Sequence[int], documents: Documents) -> Iterator[tuple[int, pa.Array]]:
    """In which of several files, each with the documents from a first one on, ascending documents lie: index, rows."""
    starts = np.array(first_documents, np.uint64)
    indices = np.searchsorted(starts, documents, side="right") - 1
    for index in np.unique(indices).tolist():
        yield index, pa.array(documents[indices == index] - starts[index])


def read_columns(path: Path, names: list[str]) -> pa.Table:
    """Some columns of an Arrow file, mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(names)


def tag(files: list[InputFile], options: ReadOptions, tagger: Tagger, job: Job) -> Corpus:
    """Have every document tagged that was not before a kill."""
    units = list(plan_units(files, job.effort.part_bytes, options.errors))
    store = PartStore(job.work / ATTRIBUTES_FOLDER)
    store.folder.mkdir(exist_ok=True)
    tasks = {unit.key: Task(store.marker(unit), unit.num_bytes, unit) for unit in units}
    job.run("read", partial(_tag_unit, store, options, tagger), list(tasks.values()))
    corpus = _load(units, store, job)
    if options.errors == "skip":
        path = job.work.parent / REPORT_FOLDER / SKIPPED_FILE
        path.parent.mkdir(exist_ok=True)
        job.run_in_one("skipped", partial(_list_skipped, corpus, path, job.work), path)
    return corpus


def _tag_unit(store: PartStore, options: ReadOptions, tagger: Tagger, unit: Unit, advance: Advance) -> None:
    """Commit the attributes of a unit's documents, those parts that are not there yet; then list all parts."""
    numbers = []
    for part in read_parts(unit, options, advance):
        numbers.append(part.number)
        path = store.part_path(unit, part.number)
        if path.exists():
            continue
        counts: dict[str, Any] = {}
        batches = [_batch(rows, tagger) for rows in part.batches(TAGGED_CHARACTERS, counts)] or [_batch([], tagger)]
        counts["num_documents"] = sum(batch.num_rows for batch in batches)
        write_batches(path, batches[0].schema.with_metadata({b"megatrain": canonical_json(counts)}), batches)
    store.finish_unit(unit, numbers)


def _batch(rows: list[tuple[int, Record]], tagger: Tagger) -> pa.RecordBatch:
    texts = [record.text for _, record in rows]
    columns = {
        "id": pa.array([record.id for _, record in rows], pa.string()),
        "file": pa.array([record.file for _, record in rows], pa.uint32()),
        "row": pa.array([row for row, _ in rows], pa.uint64()),
        "text_bytes": pa.array([len(text.encode()) for text in texts], pa.uint64()),
    }
    return pa.RecordBatch.from_pydict({**columns, **tagger(texts)})


def _load(units: Sequence[Unit], store: PartStore, job: Job) -> Corpus:
    keys = ("num_rows", "num_documents", "num_skipped")
    listed = job.share(
        "parts", lambda: [[[n, *(counts[key] for key in keys)] for n, counts in store.listed(unit)] for unit in units]
    )
    parts = []
    first_row = first_document = 0
    for index, (unit, parts_of_unit) in enumerate(zip(units, listed, strict=True)):
        if unit.start == 0:
            first_row = 0
        for number, num_rows, num_documents, num_skipped in parts_of_unit:
            path = store.part_path(unit, number)
            parts.append(TaggedPart(path, index, first_row, first_document, num_documents, num_skipped))
            first_row += num_rows
            first_document += num_documents
    return Corpus(units, parts)


def _list_skipped(corpus: Corpus, path: Path, work: Path) -> None:
    with committed(path, work) as unfinished, unfinished.open("wb") as file:
        for part in corpus.parts:
            if part.num_skipped:
                counts = orjson.loads(pa.ipc.open_file(str(part.path)).schema.metadata[b"megatrain"])
                file.write(corpus.units[part.unit].skipped_lines(part.first_row, counts["skipped"]))

"""Every document looked at once: what a judge says of it is kept, beside where the document stands; its text is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from data_tools.clean.job import Job, Task
from data_tools.inputs import Kind
from data_tools.readers import read_parts
from data_tools.units import Part, ReadOptions, Record, Unit
from data_tools.work import Advance
from megatrain.data.format import canonical_json, commit_bytes, committed

JUDGE_CHARACTERS = 1 << 20
"""About how much text a judge is given at once."""

PLACE_FIELDS = [
    pa.field("id", pa.string()),
    pa.field("file", pa.uint32()),
    pa.field("row", pa.uint64()),
    pa.field("text_bytes", pa.uint64()),
]


class Judge(Protocol):
    """Says something of each text, as columns. Goes to other processes, so it is to be picklable."""

    def fields(self) -> list[pa.Field]:
        """The columns."""
        ...

    def __call__(self, texts: list[str]) -> list[pa.Array]:
        """The columns for these texts."""
        ...


@dataclass(frozen=True)
class Surveyor:
    """Commits what the judge says of a unit's documents, part by part."""

    folder: Path
    options: ReadOptions
    judge: Judge

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Survey the parts of the unit that are not there yet; then list them all."""
        listed = []
        for part in read_parts(unit, self.options, advance):
            path = self.folder / f"{unit.key}-{part.number:06d}.arrow"
            if not path.exists():
                self._commit(path, unit, part)
            with pa.memory_map(str(path)) as source:
                counts = orjson.loads(pa.ipc.open_file(source).schema.metadata[b"megatrain"])
            listed.append({"path": path.name, **counts})
        commit_bytes(list_path(self.folder, unit), orjson.dumps(listed))

    def _commit(self, path: Path, unit: Unit, part: Part) -> None:
        counts = {"num_rows": 0, "num_documents": 0}
        fields = PLACE_FIELDS + self.judge.fields()
        batches = [self._batch(rows) for rows in _in_batches(part, unit.files[0].kind is Kind.TEXT, counts)]
        schema = pa.schema(fields, {b"megatrain": canonical_json(counts)})
        with committed(path) as unfinished, pa.ipc.new_file(str(unfinished), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def _batch(self, rows: list[tuple[int, Record]]) -> pa.RecordBatch:
        texts = [record.text for _, record in rows]
        places = [
            [record.id for _, record in rows],
            [record.file for _, record in rows],
            [row for row, _ in rows],
            [len(text.encode()) for text in texts],
        ]
        columns = [pa.array(values, each.type) for values, each in zip(places, PLACE_FIELDS, strict=True)]
        return pa.RecordBatch.from_arrays(
            columns + self.judge(texts), schema=pa.schema(PLACE_FIELDS + self.judge.fields())
        )


def _in_batches(part: Part, is_text: bool, counts: dict[str, int]) -> Iterator[list[tuple[int, Record]]]:
    rows: list[tuple[int, Record]] = []
    num_characters = 0
    for row, record in enumerate(part.rows):
        counts["num_rows"] += 1
        if record is None:
            continue
        counts["num_documents"] += 1
        rows.append((0 if is_text else row, record))
        num_characters += len(record.text)
        if num_characters >= JUDGE_CHARACTERS:
            yield rows
            rows, num_characters = [], 0
    if rows:
        yield rows


class Place(NamedTuple):
    """Where a document stands in the input."""

    id: str
    file: str
    row: int


@dataclass(frozen=True)
class SurveyedPart:
    """A part of the input, and how many rows and documents there are before it."""

    path: Path
    unit: int
    first_row: int
    """Row in the file at which the part begins."""
    first_document: int
    num_documents: int


@dataclass(frozen=True)
class Corpus:
    """The documents of the whole input in order, by number, and what the survey has kept of them."""

    units: Sequence[Unit]
    parts: Sequence[SurveyedPart]

    @staticmethod
    def load(units: Sequence[Unit], folder: Path, job: Job) -> Corpus:
        """Of units that are all surveyed."""
        lists = job.share("parts", lambda: [orjson.loads(list_path(folder, unit).read_bytes()) for unit in units])
        parts = []
        first_row = first_document = 0
        for number, (unit, listed_parts) in enumerate(zip(units, lists, strict=True)):
            if unit.start == 0:
                first_row = 0
            for listed in listed_parts:
                path, num_documents = folder / listed["path"], listed["num_documents"]
                parts.append(SurveyedPart(path, number, first_row, first_document, num_documents))
                first_row += listed["num_rows"]
                first_document += num_documents
        return Corpus(units, parts)

    @property
    def num_documents(self) -> int:
        """Documents in the input, empty ones too."""
        return self.parts[-1].first_document + self.parts[-1].num_documents if self.parts else 0

    def places(self, documents: npt.NDArray[np.uint64]) -> list[Place]:
        """Where documents stand, whose numbers are ascending."""
        starts = np.array([part.first_document for part in self.parts], np.uint64)
        indices = np.searchsorted(starts, documents, side="right") - 1
        places: list[Place] = []
        for index in np.unique(indices).tolist():
            part = self.parts[index]
            wanted = documents[indices == index] - np.uint64(part.first_document)
            rows = read_columns(part.path, ["id", "file", "row"]).take(pa.array(wanted)).to_pylist()
            places += [self.place(part, row["id"], row["file"], row["row"]) for row in rows]
        return places

    def place(self, part: SurveyedPart, identity: str | None, file: int, row: int) -> Place:
        """Where a document of a part stands; its id, where the record had none, is `file:row`."""
        name = self.units[part.unit].files[file].name
        row += part.first_row
        return Place(f"{name}:{row}" if identity is None else identity, name, row)


def read_columns(path: Path, names: list[str]) -> pa.Table:
    """Some columns of an Arrow file, mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(names)


def list_path(folder: Path, unit: Unit) -> Path:
    """Where the list of a unit's parts is, or will be."""
    return folder / f"{unit.key}.json"


def survey(units: Sequence[Unit], options: ReadOptions, judge: Judge, job: Job) -> Corpus:
    """Let the judge see every document that it has not seen before a kill."""
    folder = job.work / "survey"
    folder.mkdir(exist_ok=True)
    tasks = [Task(list_path(folder, unit), unit.num_bytes, unit) for unit in units]
    job.run("read", Surveyor(folder, options, judge), list({task.done: task for task in tasks}.values()))
    return Corpus.load(units, folder, job)

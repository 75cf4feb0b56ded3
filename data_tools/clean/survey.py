"""Every document looked at once: what a judge says of it is kept, beside where the document stands; its text is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from data_tools.clean.job import REPORT_FOLDER, SURVEY_FOLDER, Job, Task
from data_tools.readers import read_parts
from data_tools.units import Part, ReadOptions, Record, Unit
from data_tools.work import Advance, write_batches
from megatrain.data.format import SKIPPED_FILE, canonical_json, commit_bytes, committed

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

    def __call__(self, texts: list[str]) -> list[pa.Array]:
        """The columns for these texts."""


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
        counts: dict[str, Any] = {}
        batches = [self._batch(rows) for rows in part.batches(JUDGE_CHARACTERS, counts)]
        counts["num_documents"] = sum(batch.num_rows for batch in batches)
        fields = PLACE_FIELDS + self.judge.fields()
        write_batches(path, pa.schema(fields, {b"megatrain": canonical_json(counts)}), batches)

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


class DocumentPlace(NamedTuple):
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
    num_skipped: int


@dataclass(frozen=True)
class Corpus:
    """The documents of the whole input in order, by number, and what the survey has kept of them."""

    units: Sequence[Unit]
    parts: Sequence[SurveyedPart]

    @staticmethod
    def load(units: Sequence[Unit], folder: Path, job: Job) -> Corpus:
        """Of units that are all surveyed."""
        keys = ("path", "num_rows", "num_documents", "num_skipped")
        lists = job.share(
            "parts", lambda: [[[each[key] for key in keys] for each in _listed(folder, unit)] for unit in units]
        )
        parts = []
        first_row = first_document = 0
        for number, (unit, listed_parts) in enumerate(zip(units, lists, strict=True)):
            if unit.start == 0:
                first_row = 0
            for name, num_rows, num_documents, num_skipped in listed_parts:
                path = folder / name
                parts.append(SurveyedPart(path, number, first_row, first_document, num_documents, num_skipped))
                first_row += num_rows
                first_document += num_documents
        return Corpus(units, parts)

    @property
    def num_skipped(self) -> int:
        """Rows that could not be read."""
        return sum(part.num_skipped for part in self.parts)

    @property
    def num_documents(self) -> int:
        """Documents in the input, empty ones too."""
        return self.parts[-1].first_document + self.parts[-1].num_documents if self.parts else 0

    def places(self, documents: npt.NDArray[np.uint64]) -> list[DocumentPlace]:
        """Where documents stand, whose numbers are ascending."""
        starts = np.array([part.first_document for part in self.parts], np.uint64)
        indices = np.searchsorted(starts, documents, side="right") - 1
        places: list[DocumentPlace] = []
        for index in np.unique(indices).tolist():
            part = self.parts[index]
            wanted = documents[indices == index] - np.uint64(part.first_document)
            rows = read_columns(part.path, ["id", "file", "row"]).take(pa.array(wanted)).to_pylist()
            places += [self.place(part, row["id"], row["file"], row["row"]) for row in rows]
        return places

    def place(self, part: SurveyedPart, identity: str | None, file: int, row: int) -> DocumentPlace:
        """Where a document of a part stands; its id, where the record had none, is `file:row`."""
        name = self.units[part.unit].files[file].name
        row += part.first_row
        return DocumentPlace(f"{name}:{row}" if identity is None else identity, name, row)


def read_columns(path: Path, names: list[str]) -> pa.Table:
    """Some columns of an Arrow file, mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(names)


def list_path(folder: Path, unit: Unit) -> Path:
    """Where the list of a unit's parts is, or will be."""
    return folder / f"{unit.key}.json"


def survey(units: Sequence[Unit], options: ReadOptions, judge: Judge, job: Job) -> Corpus:
    """Let the judge see every document that it has not seen before a kill."""
    folder = job.work / SURVEY_FOLDER
    folder.mkdir(exist_ok=True)
    tasks = [Task(list_path(folder, unit), unit.num_bytes, unit) for unit in units]
    job.run("read", Surveyor(folder, options, judge), list({task.done: task for task in tasks}.values()))
    corpus = Corpus.load(units, folder, job)
    if options.errors == "skip":
        path = job.work.parent / REPORT_FOLDER / SKIPPED_FILE
        path.parent.mkdir(exist_ok=True)
        job.run_alone("skipped", partial(_list_skipped, corpus, folder, path, job.work), path)
    return corpus


def _listed(folder: Path, unit: Unit) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = orjson.loads(list_path(folder, unit).read_bytes())
    return listed


def _list_skipped(corpus: Corpus, folder: Path, path: Path, work: Path) -> None:
    """Write down the rows that could not be read, with their files."""
    with committed(path, work) as unfinished, unfinished.open("wb") as file:
        for number, parts in groupby(corpus.parts, lambda part: part.unit):
            unit = corpus.units[number]
            for part, listed in zip(parts, _listed(folder, unit), strict=True):
                file.write(unit.skipped_lines(part.first_row, listed["skipped"]))

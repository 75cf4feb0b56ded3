"""Writing the documents that stay: .jsonl.zst with the keys that Dolma and datatrove use, and a list of the others.

A document keeps all keys of its record. `text`, `id`, `source` and `metadata.provenance` (the file and row that it was
first read from) are there in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import zstandard

from data_tools.clean.attributes import (
    CHUNK_PARTS,
    Corpus,
    Documents,
    Location,
    advance_share,
    make_folders,
    work_path,
)
from data_tools.executors import Advance
from data_tools.job import Stage, committed_names
from data_tools.readers import read_parts
from data_tools.units import Part, ReadOptions, Record, Unit, as_text
from megatrain.atomic import commit_bytes, committed, sync_folder
from megatrain.errors import DataError

EXCERPT_CHARACTERS = 4000
EXAMPLES_FOLDER, FILES_FOLDER = "examples", "files"


class Decisions(NamedTuple):
    """What is to be done with the documents of a part."""

    reasons: pa.Array
    """Why each is dropped, as text; null if it is kept."""
    kept: Documents | None
    """For each that is dropped the number of the document that is kept instead, if there is such a thing."""


Decide = Callable[[Corpus, Any], Decisions]
"""Called with a part. Goes to other processes, so it is to be picklable."""


@dataclass(frozen=True)
class OutputWriter:
    """Commits the output files: each holds what stays of CHUNK_PARTS parts."""

    corpus: Corpus
    options: ReadOptions
    work: Path
    decide: Decide
    examples: frozenset[int]
    """Documents whose text the report shows."""

    def stage(self) -> Stage:
        make_folders(self.work / FILES_FOLDER, self.corpus.num_files)
        return Stage("write", self.corpus.writes["num_bytes"].tolist(), self.commit, self.write)

    def files_of(self, unit: int) -> dict[int, Path]:
        """The output files of a unit, by their numbers in its task."""
        write = self.corpus.writes[unit]
        return {file: staged_file(self.work, number, name) for file, number, name in output_files(self.corpus, write)}

    def commit(self, number: int) -> Path:
        return list(self.files_of(number).values())[-1]

    def write(self, number: int, advance: Advance) -> None:
        """Write those files of the unit, one after another, that are not there yet."""
        files = self.files_of(number)
        there = {path.parent: committed_names(path.parent) for path in files.values()}
        write = self.corpus.writes[number]
        first, last = self.corpus.tasks[write["task"]][["first_part", "last_part"]].tolist()
        begins = [first + file * CHUNK_PARTS for file, path in files.items() if path.name not in there[path.parent]]
        parts = [index for begin in begins for index in range(begin, min(begin + CHUNK_PARTS, last))]
        share = partial(advance_share, advance, int(write["num_readers"]))
        for file, read in groupby(self._read(parts, share), lambda each: (each[0] - first) // CHUNK_PARTS):
            self._write_file(files[file], read)

    def _read(self, indices: Sequence[int], advance: Advance) -> Iterator[tuple[int, Part]]:
        """These parts of the input, by their numbers in all of it."""
        for unit_index, group in groupby(indices, lambda index: int(self.corpus.parts[index]["unit"])):
            unit = self.corpus.unit(unit_index)
            wanted = {int(self.corpus.parts[index]["number"]): index for index in group}
            for part in read_parts(unit, self.options, advance):
                if part.number in wanted:
                    yield wanted.pop(part.number), part
            if wanted:
                raise _changed(unit)

    def _write_file(self, path: Path, parts: Iterator[tuple[int, Part]]) -> None:
        excerpts: dict[str, str] = {}
        compressor = zstandard.ZstdCompressor(level=3)
        # One frame a file: some readers, datatrove's among them, stop at the end of the first.
        with (
            committed(path, self.work) as unfinished,
            unfinished.open("wb") as raw,
            compressor.stream_writer(raw, closefd=False) as file,
        ):
            for index, part in parts:
                place = self.corpus.parts[index]
                is_kept = self.decide(self.corpus, place).reasons.is_null().to_pylist()[::-1]
                document = int(place["first_document"])
                for row, record in part.rows:
                    if not isinstance(record, Record):
                        continue
                    if not is_kept:
                        raise _changed(self.corpus.unit(int(place["unit"])))
                    if document in self.examples:
                        excerpts[str(document)] = record.text[:EXCERPT_CHARACTERS]
                    if is_kept.pop():
                        file.write(_line(record, self.corpus.location(place, record.id, record.file, row)))
                    document += 1
                if is_kept:
                    raise _changed(self.corpus.unit(int(place["unit"])))
            if excerpts:
                commit_bytes(self.work / EXAMPLES_FOLDER / f"{path.stem}.json", orjson.dumps(excerpts))


def output_files(corpus: Corpus, write: Any) -> Iterator[tuple[int, int, str]]:
    """The output files of a unit: number in its task, number among all, and name."""
    task = corpus.tasks[write["task"]]
    num_files = -(-int(task["last_part"] - task["first_part"]) // CHUNK_PARTS)
    for file in range(int(write["reader"]), num_files, int(write["num_readers"])):
        yield file, int(task["first_file"]) + file, f"part-{int(write['task']):06d}-{file:06d}.jsonl.zst"


def move_staged(moves: Iterable[tuple[Path, Path]]) -> None:
    """Move each file to where it belongs, from where it lies staged; those that were moved before are passed over."""
    parents = set()
    for path, staged in moves:
        if path.parent not in parents:
            path.parent.mkdir(exist_ok=True)
            parents.add(path.parent)
        with suppress(FileNotFoundError):  # moved before
            staged.rename(path)
    for parent in parents:
        sync_folder(parent)


def staged_file(work: Path, number: int, name: str) -> Path:
    """Where an output file lies until all of the result is whole."""
    return work_path(work / FILES_FOLDER, number, name)


def _changed(unit: Unit) -> DataError:
    named = " to ".join(dict.fromkeys((unit.files[0].name, unit.files[-1].name)))
    return DataError(
        f"{named}: not the same documents as when they were first read. Start the "
        "command again with --restart, once nobody changes them."
    )


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

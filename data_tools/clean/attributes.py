"""Attributes of every document: what a tagger says of each, beside where the document stands; its text is not kept.

A chunk is what one unit of work reads: some parts of a large file, or several small files. It commits one file of
attributes; more of them, one after another as it goes, where a file must be read from its start and has many parts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import xxhash

from data_tools.assemble import runs_of
from data_tools.executors import Advance
from data_tools.inputs import InputFile
from data_tools.job import Records, Stage, committed_names, map_committed
from data_tools.memory import Memory
from data_tools.readers import plan_units, read_parts
from data_tools.units import Part, ReadOptions, Record, Unit
from megatrain.atomic import committed

CHUNK_PARTS = 16
"""Parts in one file of attributes, and in one output file."""
CHUNK_FILE_BYTES = 1 << 26
"""A file of attributes ends with the part that makes it so large: many short documents have much to be said of."""
BATCH_DOCUMENTS = 1 << 14
"""Whose attributes are looked at together."""
MAX_READERS = 8
"""Units that read one file which must be read from its start, its parts in turns: more would decompress too much."""
READER_CHUNKS = 4
"""A further unit reads such a file for each so many chunks."""
TASK_BYTES = 1 << 28
"""About how much input makes one list of dropped documents,"""
LIST_PARTS = 64
"""or so many parts of a large file of JSON lines."""
TAGGED_CHARACTERS = 1 << 20
"""About how much text a tagger is given at once,"""
TAGGED_DOCUMENTS = 1 << 11
"""or so many documents: rensa gives 256 numbers of 40 bytes for each."""
LISTING = b"listing"
FOLDER_FILES, WORK_FILES = 1000, 32

Documents = npt.NDArray[np.uint64]
Tagger = Callable[[list[str]], Mapping[str, pa.Array]]
"""Gives the attributes of some texts, as columns. Goes to other processes, so it is to be picklable."""

PART = np.dtype(
    [
        *((name, np.uint32) for name in ("unit", "number", "file", "place", "num_skipped")),
        *((name, np.uint64) for name in ("first_in_file", "first_row", "first_document", "num_documents")),
    ]
)
"""A part of the input: its unit and number there; in which file its attributes are, at which place and from which row
on; how many rows (of its input file) and documents there are before it."""
TASK = np.dtype([(name, np.uint64) for name in ("first_part", "last_part", "first_file", "num_bytes")])
"""Parts [first, last) with one list of what is dropped of them; the first of their output files, of all."""
WRITE = np.dtype([(name, np.uint64) for name in ("task", "reader", "num_readers", "num_bytes")])
"""Every `num_readers`th output file of a task, from file `reader` on."""


class Location(NamedTuple):
    """Where a document stands in the input."""

    id: str
    file: str
    row: int


class Piece(NamedTuple):
    """What one of several readers takes of a unit."""

    unit: int
    reader: int = 0
    num_readers: int = 1


class Reopening:
    """What its cached properties map stays behind when it is pickled: each process maps for itself what it needs."""

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]


def work_path(folder: Path, number: int, name: str) -> Path:
    """Where a numbered file of the work lies: so few in a folder that to list it is nothing beside a unit's work."""
    return folder / f"{number // WORK_FILES**2:04d}" / f"{number // WORK_FILES % WORK_FILES:02d}" / name


def make_folders(folder: Path, total: int) -> None:
    """Make the folders that `work_path` names: units make none."""
    for number in range(0, max(total, 1), WORK_FILES):
        work_path(folder, number, "").mkdir(parents=True, exist_ok=True)


def result_path(folder: Path, number: int, name: str, total: int) -> Path:
    """Where the file number `number` of `total` of the result lies: in `folder`, or, if they are many, in one below."""
    return folder / name if total <= FOLDER_FILES else folder / f"{number // FOLDER_FILES:04d}" / name


def save_table(path: Path, table: npt.NDArray[Any]) -> None:
    with committed(path) as unfinished, unfinished.open("wb") as file:
        np.save(file, table)


def plan_reading(
    files: list[InputFile], options: ReadOptions, part_bytes: int, folder: Path
) -> tuple[Records, Records]:
    """The units of the input, and the chunks in which they are read: files, of which workers map what they need."""
    paths = folder / "units.arrow", folder / "chunks.arrow"
    there = committed_names(folder)
    if paths[0].name not in there:
        Records.write(paths[0], plan_units(files, part_bytes, options.errors, CHUNK_PARTS))
    units, chunks = map(Records, paths)
    if paths[1].name not in there:
        Records.write(paths[1], _chunks(map(Unit.load, units)))
    return units, chunks


def _chunks(units: Iterator[Unit]) -> Iterator[dict[str, Any]]:
    """Chunks of about CHUNK_PARTS parts: their pieces, bytes to be read, and a name that follows from these."""
    group: list[tuple[Piece, str, int]] = []
    size = 0
    for index, unit in enumerate(units):
        num_readers = _num_readers(unit)
        if group and (num_readers > 1 or size + unit.text_bytes > CHUNK_PARTS * unit.part_bytes):
            yield _chunk(group)
            group, size = [], 0
        pieces = [(Piece(index, reader, num_readers), unit.key, unit.num_bytes) for reader in range(num_readers)]
        if num_readers > 1:
            yield from (_chunk([piece]) for piece in pieces)
        else:
            group += pieces
            size += unit.text_bytes
    if group:
        yield _chunk(group)


def _num_readers(unit: Unit) -> int:
    """Units of work for a unit of the input: more than one where a large file has to be read from its start."""
    if unit.is_seekable or len(unit.files) > 1 or unit.stop is not None:
        return 1
    return max(1, min(MAX_READERS, unit.text_bytes // (READER_CHUNKS * CHUNK_PARTS * unit.part_bytes)))


def _chunk(group: list[tuple[Piece, str, int]]) -> dict[str, Any]:
    name = xxhash.xxh3_128_hexdigest(str([(key, piece.reader, piece.num_readers) for piece, key, _ in group]).encode())
    num_bytes = sum(size // piece.num_readers for piece, _, size in group)
    return {"name": name, "num_bytes": num_bytes, "pieces": [[*piece] for piece, *_ in group]}


def advance_share(advance: Advance, num_readers: int, amount: int) -> None:
    advance(amount // num_readers)


@dataclass(frozen=True)
class Tagging:
    """Reads chunks and commits the attributes of their documents."""

    folder: Path
    units: Records
    chunks: Records
    options: ReadOptions
    tagger: Tagger

    def stage(self) -> Stage:
        return Stage("read", [chunk["num_bytes"] for chunk in self.chunks], self.commit, self.read)

    def commit(self, number: int) -> Path:
        return self.path(self.chunks[number]["name"])

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.arrow"

    def earlier(self, path: Path, number: int) -> Path:
        """Where the attributes of a chunk are committed before the last of them are."""
        return path.with_name(f"{path.stem}-{number:06d}.arrow")

    def read(self, number: int, advance: Advance) -> None:
        path = self.commit(number)
        there = committed_names(path.parent)
        parts = self._parts(number, advance)
        following = next(parts, None)
        num_earlier = 0
        while (earlier := self.earlier(path, num_earlier)).name in there:
            for _ in read_listing(earlier).parts:
                following = next(parts, None)
            num_earlier += 1
        schema = self._batch([]).schema
        while True:
            earlier, listing, size = self.earlier(path, num_earlier), Listing(num_earlier, [], []), 0
            with committed(earlier) as unfinished, pa.ipc.new_file(str(unfinished), schema) as writer:
                while following and len(listing.parts) < CHUNK_PARTS and size < CHUNK_FILE_BYTES:
                    piece, part = following
                    counts: dict[str, Any] = {}
                    num_documents = 0
                    for batch in self._batches(part, counts):
                        writer.write_batch(batch)
                        size, num_documents = size + batch.nbytes, num_documents + batch.num_rows
                    listing.parts.append([piece, part.number, counts["num_rows"], num_documents, counts["num_skipped"]])
                    listing.skipped.append(counts["skipped"])
                    following = next(parts, None)
                writer.write_batch(self._batch([]), {LISTING: orjson.dumps(tuple(listing))})
            if not following:
                earlier.rename(path)
                return
            num_earlier += 1

    def _parts(self, number: int, advance: Advance) -> Iterator[tuple[int, Part]]:
        """The parts of a chunk, each with the index of its piece."""
        for index, piece in enumerate(map(Piece._make, self.chunks[number]["pieces"])):
            reader, num_readers = piece.reader, piece.num_readers
            unit = Unit.load(self.units[piece.unit])
            unit = replace(unit, parts_at_once=CHUNK_PARTS, reader=reader, num_readers=num_readers)
            for part in read_parts(unit, self.options, partial(advance_share, advance, num_readers)):
                yield index, part

    def _batches(self, part: Part, counts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        for rows in part.batches(TAGGED_CHARACTERS, counts):
            for start in range(0, len(rows), TAGGED_DOCUMENTS):
                yield self._batch(rows[start : start + TAGGED_DOCUMENTS])

    def _batch(self, rows: list[tuple[int, Record]]) -> pa.RecordBatch:
        texts = [record.text for _, record in rows]
        columns = {
            "id": pa.array([record.id for _, record in rows], pa.string()),
            "file": pa.array([record.file for _, record in rows], pa.uint32()),
            "row": pa.array([row for row, _ in rows], pa.uint64()),
            "text_bytes": pa.array([len(text.encode()) for text in texts], pa.uint64()),
        }
        return pa.RecordBatch.from_pydict({**columns, **self.tagger(texts)})


class Listing(NamedTuple):
    """What a file of attributes says of itself at its end, in a batch without documents."""

    num_earlier: int
    """Files of the same chunk before it."""
    parts: list[list[int]]
    """Piece of the chunk, number, rows, documents, rows skipped."""
    skipped: list[list[tuple[int, int, str]]]
    """For each part: see `Part.batches`."""


def read_listing(path: Path) -> Listing:
    with map_committed(path) as source:
        reader = pa.ipc.open_file(source)
        metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata
    return Listing(*orjson.loads(metadata[LISTING]))


def index_parts(tagging: Tagging, corpus: Corpus, skipped_path: Path) -> None:
    """Commit the tables of parts and of what is to be written, and the list of what was skipped."""
    numbers, names = array("q"), list[str]()
    units = np.array([_described(Unit.load(unit)) for unit in tagging.units], np.int64).reshape(-1, 4)
    for chunk in tagging.chunks:
        path = tagging.path(chunk["name"])
        last = read_listing(path)
        pieces = [Piece._make(piece) for piece in chunk["pieces"]]
        for file in [*(tagging.earlier(path, number) for number in range(last.num_earlier)), path]:
            first = 0
            for place, (piece, *counts) in enumerate((last if file == path else read_listing(file)).parts):
                numbers.extend((pieces[piece].unit, len(names), place, first, *counts))
                first += counts[2]
            names.append(f"{file.parent.name}/{file.name}")
    found = np.array(numbers, np.int64).reshape(-1, 8)
    found = found[np.lexsort((found[:, 4], found[:, 0]))]  # several readers of a file take turns
    parts = np.zeros(len(found), PART)
    for column, name in enumerate(("unit", "file", "place", "first_in_file", "number", "", "num_documents")):
        if name:
            parts[name] = found[:, column]
    parts["num_skipped"] = found[:, 7]
    parts["first_document"] = np.cumsum(found[:, 6]) - found[:, 6]
    rows = np.cumsum(found[:, 5]) - found[:, 5]
    begins = np.flatnonzero(np.diff(np.cumsum(units[:, 0])[found[:, 0]], prepend=0))  # with what parts a file begins
    parts["first_row"] = rows - np.repeat(rows[begins], np.diff(begins, append=len(parts)))
    Records.write(corpus.folder / "files.arrow", names)
    _plan_writing(corpus.folder, found[:, 0], units)
    if tagging.options.errors == "skip":
        with committed(skipped_path, corpus.folder) as unfinished, unfinished.open("wb") as lines:
            lines.writelines(_skipped_lines(parts, names, tagging))
    save_table(corpus.folder / "parts.npy", parts)


def _described(unit: Unit) -> tuple[bool, int, int, bool]:
    """Whether a file begins with the unit; its bytes; its readers; whether a list of what is dropped may end there."""
    begins_list = not unit.is_seekable or unit.start % (LIST_PARTS * unit.part_bytes) == 0
    return unit.start == 0, unit.num_bytes, _num_readers(unit), begins_list


def _plan_writing(folder: Path, unit_of_part: npt.NDArray[np.int64], units: npt.NDArray[np.int64]) -> None:
    """Group the units into tasks of about TASK_BYTES; one with a file that has several readers has several writers."""
    begins = np.flatnonzero(np.diff(unit_of_part, prepend=-1))
    may_end = [*units[unit_of_part[begins[1:]], 3].tolist(), True]
    tasks, writes = list[tuple[int, ...]](), list[tuple[int, ...]]()
    first = first_file = num_bytes = 0
    num_readers = 1
    for begin, end, ends in zip(begins.tolist(), [*begins[1:].tolist(), len(unit_of_part)], may_end, strict=False):
        _, unit_bytes, readers, _ = units[unit_of_part[begin]].tolist()
        num_bytes, num_readers = num_bytes + unit_bytes, max(num_readers, readers)
        if end == len(unit_of_part) or (ends and num_bytes >= TASK_BYTES):
            num_files = -(-(end - first) // CHUNK_PARTS)
            num_readers = min(num_readers, num_files)
            writes += [(len(tasks), reader, num_readers, num_bytes // num_readers) for reader in range(num_readers)]
            tasks.append((first, end, first_file, num_bytes))
            first, first_file, num_bytes, num_readers = end, first_file + num_files, 0, 1
    save_table(folder / "tasks.npy", np.array(tasks, TASK))
    save_table(folder / "writes.npy", np.array(writes, WRITE))


def _skipped_lines(parts: npt.NDArray[Any], names: Sequence[str], tagging: Tagging) -> Iterator[bytes]:
    for part in parts[parts["num_skipped"] > 0]:
        skipped = read_listing(tagging.folder / names[part["file"]]).skipped[part["place"]]
        yield Unit.load(tagging.units[int(part["unit"])]).skipped_lines(int(part["first_row"]), skipped)


@dataclass(frozen=True)
class Corpus(Reopening):
    """The documents of the whole input in order, by number, and their attributes: tables and files that are mapped."""

    folder: Path
    attributes: Path
    units: Records
    memory: Memory

    @cached_property
    def parts(self) -> npt.NDArray[Any]:
        return self._table("parts")

    @cached_property
    def tasks(self) -> npt.NDArray[Any]:
        return self._table("tasks")

    @cached_property
    def writes(self) -> npt.NDArray[Any]:
        return self._table("writes")

    def _table(self, name: str) -> npt.NDArray[Any]:
        table: npt.NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return table

    @property
    def num_files(self) -> int:
        """Output files."""
        return sum(-(-int(last - first) // CHUNK_PARTS) for first, last, *_ in self.tasks[-1:]) + (
            int(self.tasks[-1]["first_file"]) if len(self.tasks) else 0
        )

    @property
    def num_skipped(self) -> int:
        return int(self.parts["num_skipped"].sum(dtype=np.int64))

    @property
    def num_documents(self) -> int:
        """Documents in the input, empty ones too."""
        return int(self.parts[-1]["first_document"] + self.parts[-1]["num_documents"]) if len(self.parts) else 0

    @cached_property
    def first_documents(self) -> Documents:
        """Of each part."""
        return np.ascontiguousarray(self.parts["first_document"])

    def columns(self, part: Any, names: list[str]) -> pa.Table:
        """Some attributes of the documents of a part."""
        table = self._attributes(int(part["file"]))
        return table.slice(int(part["first_in_file"]), int(part["num_documents"])).select(names)

    def batches(self, first: int, last: int, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Some attributes of documents [first, last), BATCH_DOCUMENTS at a time."""
        for start in range(first, last, BATCH_DOCUMENTS):
            stop = min(start + BATCH_DOCUMENTS, last)
            begin = int(np.searchsorted(self.first_documents, np.uint64(start), side="right")) - 1
            tables = []
            for part in self.parts[begin : int(np.searchsorted(self.first_documents, np.uint64(stop)))]:
                offset = int(part["first_document"])
                tables.append(self.columns(part, names).slice(max(start - offset, 0), stop - max(start, offset)))
            (batch,) = pa.concat_tables(tables).combine_chunks().to_batches()
            yield batch
            self.memory.release_mapped()

    @cached_property
    def _attributes(self) -> Callable[[int], pa.Table]:
        names = Records(self.folder / "files.arrow")
        return lru_cache(2)(lambda file: pa.Table.from_batches(map_batches(self.attributes / names[file])))

    @cached_property
    def unit(self) -> Callable[[int], Unit]:
        return lru_cache(2)(lambda index: Unit.load(self.units[index]))

    def locations(self, documents: Documents) -> list[Location]:
        """Where a few documents stand, whose numbers are ascending."""
        found = []
        for index, begin, end in runs_of(self.parts_of(documents)):
            rows = documents[begin:end] - self.first_documents[index]
            found += self.locations_in(self.parts[index], pa.array(rows))
        return found

    def parts_of(self, documents: Documents) -> npt.NDArray[np.int64]:
        """The index of the part that each document is in."""
        return np.searchsorted(self.first_documents, documents, side="right") - 1

    def locations_in(self, part: Any, documents: pa.Array) -> list[Location]:
        """Where documents of a part stand, by their numbers in it."""
        rows = self.columns(part, ["id", "file", "row"]).take(documents).to_pylist()
        return [self.location(part, row["id"], row["file"], row["row"]) for row in rows]

    def location(self, part: Any, identity: str | None, file: int, row: int) -> Location:
        """Where a document of a part stands; its id, where the record had none, is `file:row`."""
        name = self.unit(int(part["unit"])).files[file].name
        row += int(part["first_row"])
        return Location(f"{name}:{row}" if identity is None else identity, name, row)


def map_batches(path: Path) -> list[pa.RecordBatch]:
    """The batches of an Arrow file, mapped; the file is not held open."""
    with map_committed(path) as source:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

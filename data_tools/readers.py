"""Cutting the input into units, and reading the parts of one: the same files give the same parts, always."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby

from data_tools.image_files import read_idx, read_image
from data_tools.inputs import InputFile
from data_tools.kinds import WHOLE_FILES, Kind
from data_tools.lines import read_json_lines, read_texts
from data_tools.memory import NO_BOUND, Memory
from data_tools.tables import read_tables, row_group_ranges
from data_tools.units import PART_BYTES, BadInput, BadRow, Part, ReadOptions, Row, Unit

MAX_FILES = 1024
"""Files in one unit."""
MIN_FILES = 16
"""Fewer small files in a row are units of their own, unless they are texts: then what is done is kept sooner."""
SMALL_FILES_IN_PART = 64
"""A file is small if so many of its size are a part; it may be compressed, and grow."""
PARTS_IN_UNIT = 64
"""Parts of a plain JSON-lines file in one unit."""
MAX_READERS = 8
"""Of one file that is read from its start: each decompresses all of it, some ten times faster than it encodes."""
MANY_PARTS, MAX_PARTS_AT_ONCE = 1 << 12, 8
"""From so many parts on they are committed two at once, from twice as many four, and so on."""

READERS: dict[Kind, Callable[[Unit, ReadOptions, Callable[[int], None]], Iterator[Part]]] = {
    Kind.JSON_LINES: read_json_lines,
    Kind.JSON: read_json_lines,
    Kind.CSV: read_tables,
    Kind.TSV: read_tables,
    Kind.PARQUET: read_tables,
    Kind.ARROW: read_tables,
    Kind.TEXT: read_texts,
    Kind.IMAGE: read_image,
    Kind.IDX: read_idx,
}


def parts_at_once(files: list[InputFile], part_bytes: int, memory: Memory = NO_BOUND) -> int:
    """How many parts are to be committed as one file: the more, the larger the input."""
    num_parts = sum(Unit((file,), num_bytes=file.num_bytes).text_bytes for file in files) // part_bytes
    return min(1 << max(num_parts // MANY_PARTS, 1).bit_length() - 1, memory.fitting(4 * part_bytes, MAX_PARTS_AT_ONCE))


def plan_commits(
    files: list[InputFile], part_bytes: int, errors: str, num_workers: int, memory: Memory = NO_BOUND
) -> Iterator[Unit]:
    """Cut the files into units of one commit each, in document order; those that cannot be cut, among readers.

    A file has as many readers as its share of so many workers.
    """
    at_once = parts_at_once(files, part_bytes, memory)
    all_bytes = max(sum(file.num_bytes for file in files), 1)
    for unit in plan_units(files, part_bytes, errors, at_once):
        unit = replace(unit, parts_at_once=at_once)
        num_readers = 1
        if not unit.is_one_part and unit.stop is None:
            useful = min(unit.text_bytes // (part_bytes * at_once), MAX_READERS)
            num_readers = max(min(round(num_workers * unit.num_bytes / all_bytes), useful), 1)
        for reader in range(num_readers):
            yield replace(unit, reader=reader, num_readers=num_readers)


def plan_units(
    files: list[InputFile], part_bytes: int = PART_BYTES, errors: str = "strict", parts_in_unit: int = PARTS_IN_UNIT
) -> Iterator[Unit]:
    """Cut the files into units, in document order; where they can be read from the middle, into small ones."""
    for is_small, group in groupby(files, key=lambda file: _is_small(file, part_bytes)):
        run = list(group)
        if is_small and (len(run) >= MIN_FILES or run[0].kind in WHOLE_FILES):
            yield from _group_files(run, part_bytes)
            continue
        for file in run:
            for start, stop, num_bytes in _ranges(file, part_bytes, errors, parts_in_unit):
                yield Unit((file,), start, stop, num_bytes, part_bytes)


def _is_small(file: InputFile, part_bytes: int) -> str:
    """Which of the files beside it a file may be in one unit with: texts, images, or other small ones; none if it is
    large."""
    if file.kind in WHOLE_FILES:
        return file.kind.value
    return "small" if file.num_bytes * SMALL_FILES_IN_PART <= part_bytes else ""


def _ranges(
    file: InputFile, part_bytes: int, errors: str, parts_in_unit: int = PARTS_IN_UNIT
) -> Iterator[tuple[int, int | None, int]]:
    """Where each unit of a file begins and ends, and how many bytes that are."""
    if file.kind is Kind.PARQUET:
        try:
            yield from row_group_ranges(file, part_bytes)
        except BadInput:
            if errors != "skip":
                raise
            yield 0, None, file.num_bytes  # its reader finds the same
    elif file.is_streamed or file.kind is Kind.ARROW:
        yield 0, None, file.num_bytes
    else:
        unit_bytes = parts_in_unit * part_bytes
        for start in range(0, file.num_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.num_bytes)
            yield start, stop, stop - start


def _group_files(files: list[InputFile], part_bytes: int) -> Iterator[Unit]:
    group: list[InputFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.num_bytes
        if size >= part_bytes or len(group) == MAX_FILES or file is files[-1]:
            yield Unit(tuple(group), num_bytes=size, part_bytes=part_bytes)
            group, size = [], 0


def read_parts(
    unit: Unit, options: ReadOptions, advance: Callable[[int], None] = lambda _: None, *, keep_bad_rows: bool = False
) -> Iterator[Part]:
    """The parts of a unit in order; `advance` is called with the number of bytes read.

    Raises DataError with file and place where something cannot be read. With `--errors skip` or `keep_bad_rows` such a
    row is a BadRow, and so is, in the last row, what is left of a damaged file; but a disk or store that fails is
    always an error.
    """
    if len(unit.files) == 1:
        parts = READERS[unit.files[0].kind](unit, options, advance)
    else:
        parts = iter([Part(0, _rows_of_files(unit, options, advance))])
    parts = _of_reader(unit, parts)
    if keep_bad_rows or options.errors == "skip":
        return parts
    return (Part(part.number, _without_bad_rows(part.rows)) for part in parts)


def _of_reader(unit: Unit, parts: Iterator[Part]) -> Iterator[Part]:
    """The parts that are this reader's. Raises DataError where a file has changed meanwhile."""
    unit.refuse_changed()
    for part in parts:
        if part.number // unit.parts_at_once % unit.num_readers == unit.reader:
            yield part
    unit.refuse_changed()


def read_commits(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """As `read_parts`, so many parts as one as are committed together."""
    for number, parts in groupby(read_parts(unit, options, advance), lambda part: part.number // unit.parts_at_once):
        yield Part(number, _renumbered(parts))


def _renumbered(parts: Iterator[Part]) -> Iterator[tuple[int, Row]]:
    first = 0
    for part in parts:
        last = -1
        for last, row in part.rows:
            yield first + last, row
        first += last + 1


def _rows_of_files(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[tuple[int, Row]]:
    for index, file in enumerate(unit.files):
        units = (Unit((file,), *extent, unit.part_bytes) for extent in _ranges(file, unit.part_bytes, "skip"))
        parts = (part for each in units for part in READERS[file.kind](each, options, advance))
        for number, row in enumerate(row for part in parts for _, row in part.rows):
            yield number, None if row is None else row._replace(file=index)


def _without_bad_rows(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    for number, row in rows:
        if isinstance(row, BadRow):
            raise row.error()
        yield number, row

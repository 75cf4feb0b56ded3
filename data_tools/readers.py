"""Cutting the input into units, and reading the parts of one: the same files give the same parts, always."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from data_tools.inputs import InputFile
from data_tools.kinds import Kind
from data_tools.lines import read_json_lines, read_texts
from data_tools.tables import read_tables, row_group_ranges
from data_tools.units import PART_BYTES, BadInput, Fault, Part, ReadOptions, Row, Unit

MAX_TEXT_FILES = 1024
"""Text files in one unit."""
PARTS_IN_UNIT = 64
"""Parts of a plain JSON-lines file in one unit: so many that even 10 TB are a list for every rank's memory."""

READERS: dict[Kind, Callable[[Unit, ReadOptions, Callable[[int], None]], Iterator[Part]]] = {
    Kind.JSON_LINES: read_json_lines,
    Kind.JSON: read_json_lines,
    Kind.CSV: read_tables,
    Kind.TSV: read_tables,
    Kind.PARQUET: read_tables,
    Kind.ARROW: read_tables,
    Kind.TEXT: read_texts,
}


def plan_units(files: list[InputFile], part_bytes: int = PART_BYTES, errors: str = "strict") -> Iterator[Unit]:
    """Cut the files into units, in document order; where they can be read from the middle, into small ones."""
    for is_text, group in groupby(files, key=lambda file: file.kind is Kind.TEXT):
        if is_text:
            yield from _group_texts(group, part_bytes)
            continue
        for file in group:
            for start, stop, num_bytes in _ranges(file, part_bytes, errors):
                yield Unit((file,), start, stop, num_bytes, part_bytes)


def _ranges(file: InputFile, part_bytes: int, errors: str) -> Iterator[tuple[int, int | None, int]]:
    """Where each unit of a file begins and ends, and how many bytes that are."""
    if file.kind is Kind.PARQUET:
        try:
            yield from row_group_ranges(file, part_bytes)
        except BadInput:
            if errors != "skip":
                raise
            yield 0, None, file.num_bytes  # whoever reads it finds the same
    elif file.is_streamed or file.kind is Kind.ARROW:
        yield 0, None, file.num_bytes
    else:
        unit_bytes = PARTS_IN_UNIT * part_bytes
        for start in range(0, file.num_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.num_bytes)
            yield start, stop, stop - start


def _group_texts(files: Iterable[InputFile], part_bytes: int) -> Iterator[Unit]:
    group: list[InputFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.num_bytes
        if size >= part_bytes or len(group) == MAX_TEXT_FILES:
            yield Unit(tuple(group), num_bytes=size, part_bytes=part_bytes)
            group, size = [], 0
    if group:
        yield Unit(tuple(group), num_bytes=size, part_bytes=part_bytes)


def read_parts(unit: Unit, options: ReadOptions, advance: Callable[[int], None] = lambda _: None) -> Iterator[Part]:
    """The parts of a unit in order; `advance` hears of bytes that were read.

    Raises DataError with file and place where something cannot be read. With `--errors skip` such a row is a Fault, and
    so is, in the last row, what is left of a damaged file; but a disk or a store that fails is an error in any case.
    """
    for part in read_parts_with_faults(unit, options, advance):
        yield part if options.errors == "skip" else Part(part.number, _without_faults(part.rows))


def read_parts_with_faults(
    unit: Unit, options: ReadOptions, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Part]:
    """The same, each row that cannot be read being a Fault, whatever the options say of errors."""
    return READERS[unit.files[0].kind](unit, options, advance)


def _without_faults(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Fault):
            raise row.error()
        yield row

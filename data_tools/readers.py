"""Cutting the input into units, and reading the parts of one: the same files give the same parts, always."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from data_tools.inputs import InputFile, Kind
from data_tools.lines import read_json_lines, read_texts
from data_tools.tables import open_parquet, read_tables
from data_tools.units import PART_BYTES, Part, ReadOptions, Unit

MAX_TEXT_FILES = 1024
"""Text files in one unit."""
PARTS_IN_UNIT = 64
"""Parts of a plain JSON-lines file in one unit: so many that even 10 TB are a list for every rank's memory."""


def plan_units(files: list[InputFile], part_bytes: int = PART_BYTES) -> Iterator[Unit]:
    """Cut the files into units, in document order; where they can be read from the middle, into small ones."""
    for is_text, group in groupby(files, key=lambda file: file.kind is Kind.TEXT):
        if is_text:
            yield from _group_texts(group, part_bytes)
            continue
        for file in group:
            if file.kind is Kind.PARQUET:
                num_groups = open_parquet(file).num_row_groups
                group_bytes = file.num_bytes // max(num_groups, 1)
                yield from (Unit((file,), k, None, group_bytes, part_bytes) for k in range(num_groups))
            elif file.kind is Kind.JSON_LINES and file.compression is None:
                unit_bytes = PARTS_IN_UNIT * part_bytes
                for start in range(0, file.num_bytes, unit_bytes):
                    stop = min(start + unit_bytes, file.num_bytes)
                    yield Unit((file,), start, stop, stop - start, part_bytes)
            else:
                yield Unit((file,), num_bytes=file.num_bytes, part_bytes=part_bytes)


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
    """The parts of a unit in order; `advance` hears of bytes that were read. Raises DataError with file and place."""
    file = unit.files[0]
    if file.kind is Kind.JSON_LINES:
        return read_json_lines(unit, options, advance)
    if file.kind is Kind.TEXT:
        return iter([Part(0, read_texts(unit, options, advance))])
    return read_tables(unit, options, advance)

"""Into which pieces the input is cut, whoever reads them.

A `Unit` is what one worker takes at a time: a byte range of a plain JSON-lines file, a row group of a parquet file, a
whole compressed or Arrow file, or some text files. It comes apart into numbered `Part`s of about PART_BYTES, by where
in the unit a document begins. So the same files give the same parts, whoever reads them, and however often. Several
workers may read the same unit, and each do some of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from data_tools.inputs import InputFile, Kind
from megatrain.errors import DataError

PART_BYTES = 16 << 20
MAX_DOCUMENT_BYTES = 1 << 28
"""A longer document is taken for a mistake, or for an attack on memory."""
USUAL_COMPRESSION = 4
"""How many times smaller compressed text is, about."""


@dataclass(frozen=True)
class ReadOptions:
    """How text is found in records, and what is done with bytes that are not UTF-8 (`strict` or `replace`)."""

    text_key: str = "text"
    id_key: str = "id"
    errors: str = "strict"
    whole_records: bool = False
    """Whether a record's other keys are read as well."""


class Record(NamedTuple):
    """One document as it stands in a file."""

    text: str
    id: str | None
    file: int
    """Index in the unit's files."""
    extra: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    """The record's other keys, if they were asked for."""


class Part(NamedTuple):
    """Part number `number` of a unit. Its rows are to be read before the next part is asked for, or not at all.

    Rows that nobody asks for are not parsed, and in a plain JSON-lines file not even read.
    """

    number: int
    rows: Iterator[Record | None]
    """None is a row without a document: a blank line."""


@dataclass(frozen=True)
class Unit:
    """What one worker takes at a time."""

    files: tuple[InputFile, ...]
    start: int = 0
    """First byte (JSON lines) or the row group (parquet)."""
    stop: int | None = None
    """A line that begins at or behind this byte belongs to another unit."""
    num_bytes: int = 0
    """About how many bytes there are to be read; for showing progress."""
    part_bytes: int = PART_BYTES

    @property
    def is_seekable(self) -> bool:
        """Whether a part can be read without those before it."""
        return self.files[0].kind is Kind.JSON_LINES and self.files[0].compression is None

    @property
    def text_bytes(self) -> int:
        """A guess at how much text there is."""
        is_compressed = self.files[0].compression or self.files[0].kind is Kind.PARQUET
        return self.num_bytes * (USUAL_COMPRESSION if is_compressed else 1)

    @property
    def key(self) -> str:
        """Names the unit's content: the files, their versions, and the range."""
        return xxhash.xxh3_128_hexdigest(
            f"{[file.key for file in self.files]} {self.start} {self.stop} {self.part_bytes}".encode()
        )


def decode(data: bytes, options: ReadOptions, file: str, row: int | None = None) -> str:
    """The text that the bytes stand for. Raises DataError with their place if they are not UTF-8 and should be."""
    try:
        return data.decode(errors=options.errors)
    except UnicodeDecodeError as error:
        place = file if row is None else f"{file}, row {row}"
        raise DataError(
            f"{place}: invalid UTF-8 at byte {error.start} ({error.reason}); "
            "--errors replace keeps such text, with U+FFFD for the bad bytes."
        ) from None

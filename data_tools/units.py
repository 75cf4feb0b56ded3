"""How the input is cut into units and parts.

A `Unit` is what one worker takes at a time: a byte range of a plain JSON-lines file, row groups of a parquet file, a
compressed or Arrow file, or many small files. It comes apart into numbered `Part`s of about PART_BYTES, by where
in the unit a document begins. So the same files give the same parts in every process and every run. A large file that
is read from its start is several units: each reader takes every n-th of its parts.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import orjson
import xxhash

from data_tools.inputs import FileSelector, InputFile
from data_tools.kinds import LFS_POINTER, WHOLE_FILES, Kind, magic_name
from megatrain.errors import DataError

PART_BYTES = 16 << 20
MAX_DOCUMENT_BYTES = 1 << 28
"""A longer document is taken for a mistake, or for an attack on memory."""
USUAL_COMPRESSION = 4
"""How many times smaller compressed text is, about."""
MAX_LISTED = 1000
"""Rows of a part that are listed as skipped; all are counted."""


class BadInput(DataError):
    """Content of an input that is not what it should be. `--errors skip` goes on behind it."""


@dataclass(frozen=True)
class Fields:
    """That records are more than a text: the messages of a conversation under `text_key`, or a prompt.

    The text of such a record is the JSON of a list: that value, and those of `keys`, null where it has none.
    """

    keys: tuple[str, ...]
    """What is read beside `text_key`."""
    is_chat: bool
    option: str
    """The option that gives `text_key`."""

    def record(self, values: list[Any], identity: str | None, extra: dict[str, Any]) -> Record:
        """Of the values of `text_key` and `keys`. Raises BadInput."""
        return Record(self.text(values), identity, 0, extra)

    def text(self, values: list[Any]) -> str:
        """Raises BadInput where the first value is not what it should be."""
        first, wanted = values[0], "a list of messages with their roles" if self.is_chat else "text"
        if not (_are_messages(first) if self.is_chat else isinstance(first, str)):
            raise BadInput(f"the value of {self.option} should be {wanted}, not {first!r:.60}")
        return orjson.dumps(values, default=as_text).decode()


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in value
    )


class AnyFields(Protocol):
    """What of each record is read: `Fields`, or those of images."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def option(self) -> str: ...

    def record(self, values: list[Any], identity: str | None, extra: dict[str, Any]) -> Record | ImageRecord: ...


@dataclass(frozen=True)
class ReadOptions:
    """How text is found in records, and what is done with what cannot be read.

    `errors`: `strict` stops at it; so does `replace`, but keeps bytes that are not UTF-8, as U+FFFD; `skip` leaves out
    the row, or what is left of the file, and counts it. A key `a.b` is also the key `b` of the object under `a`.
    """

    text_key: str = "text"
    id_key: str = "id"
    errors: str = "strict"
    whole_records: bool = False
    """Whether a record's other keys are read as well."""
    selection: FileSelector = field(default_factory=FileSelector)
    fields: AnyFields | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """What is read of a record, the id apart."""
        return (self.text_key, *self.fields.keys) if self.fields else (self.text_key,)

    @property
    def key_option(self) -> str:
        """The option that gives `text_key`."""
        return self.fields.option if self.fields else "--text-key"


class Record(NamedTuple):
    """One document as it stands in a file."""

    text: str
    id: str | None
    file: int
    """Index in the unit's files."""
    extra: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    """The record's other keys, with `whole_records`."""

    @property
    def size(self) -> int:
        """Characters of text."""
        return len(self.text)


class ImageRecord(NamedTuple):
    """One image as it stands in a file."""

    image: bytes
    """Of a file that `decode_image` reads."""
    label: int
    shape: tuple[int, int, int]
    """Height, width and channels."""
    id: str | None
    file: int = 0
    """Index in the unit's files."""

    @property
    def size(self) -> int:
        """Bytes of the image's file."""
        return len(self.image)


class BadRow(NamedTuple):
    """A row that cannot be read, or all that is left of a file."""

    problem: str
    error: Callable[[], DataError]
    """What the command stops with, unless it is to skip. Made only then: it may count the lines up to there."""
    file: int = 0
    """Index in the unit's files."""

    @staticmethod
    def of(error: BadInput) -> BadRow:
        """What an error says that has its place in it already."""
        return BadRow(str(error), partial(BadInput, str(error)))


Row = Record | ImageRecord | BadRow | None
"""None is a row without a document: a blank line."""


class Part(NamedTuple):
    """Part number `number` of a unit. Read its rows before the next part, or not at all.

    Rows that are not iterated over are not parsed, and in a plain JSON-lines file not even read.
    """

    number: int
    rows: Iterator[tuple[int, Row]]
    """Each with its number: in its file where the unit has several, else in the part."""

    def batches(self, max_size: int, counts: dict[str, Any]) -> Iterator[list[tuple[int, Any]]]:
        """The documents or images and the numbers of their rows, of about this size together at a time.

        `counts` gets `num_rows`, `num_skipped`, and `skipped`: file, row and problem of the first MAX_LISTED.
        """
        counts |= {"num_rows": 0, "num_skipped": 0, "skipped": []}
        batch: list[tuple[int, Any]] = []
        size = 0
        for number, row in self.rows:
            counts["num_rows"] += 1
            if isinstance(row, BadRow):
                counts["num_skipped"] += 1
                counts["skipped"] += [[row.file, number, row.problem]][: MAX_LISTED - len(counts["skipped"])]
            elif row is not None:
                batch.append((number, row))
                size += row.size
            if size >= max_size:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


@dataclass(frozen=True)
class Unit:
    """What one worker takes at a time."""

    files: tuple[InputFile, ...]
    start: int = 0
    """First byte (JSON lines) or row group (parquet)."""
    stop: int | None = None
    """What begins at or behind this byte, or row group, belongs to another unit."""
    num_bytes: int = 0
    """About how many bytes there are to be read; for showing progress."""
    part_bytes: int = PART_BYTES
    parts_at_once: int = 1
    """Parts that are committed as one file: at 10 TB each for itself would be too many."""
    reader: int = 0
    """Of `num_readers`, which take turns: so many parts at once."""
    num_readers: int = 1

    @classmethod
    def load(cls, values: dict[str, Any]) -> Unit:
        """What a record of a unit says."""
        files = tuple(InputFile(**{**file, "kind": Kind(file["kind"])}) for file in values.pop("files"))
        return cls(files, **values)

    @property
    def is_one_part(self) -> bool:
        """Whether all of it is committed as one file."""
        if len(self.files) > 1 or self.files[0].kind in WHOLE_FILES:
            return True
        return self.is_seekable and self.num_bytes <= self.part_bytes * self.parts_at_once

    def refuse_changed(self) -> None:
        """Raise DataError where one of its files is no longer what was found as the command began."""
        for file in self.files:
            file.refuse_changed()

    @property
    def is_seekable(self) -> bool:
        """Whether a part can be read without those before it."""
        return len(self.files) == 1 and self.files[0].kind is Kind.JSON_LINES and not self.files[0].is_streamed

    def beginning(self, num_bytes: int) -> Unit:
        """So much of the unit, if it can be read in pieces; else all of it."""
        stop = self.start + num_bytes
        return replace(self, stop=stop) if self.is_seekable and stop < (self.stop or 0) else self

    @property
    def text_bytes(self) -> int:
        """A guess at how much text there is."""
        is_compressed = self.files[0].compression or self.files[0].kind is Kind.PARQUET
        return self.num_bytes * (USUAL_COMPRESSION if is_compressed else 1)

    @property
    def key(self) -> str:
        """Names the content, whichever reader's: the files, their versions, the range, and how it is cut."""
        cut = (self.start, self.stop, self.part_bytes, self.parts_at_once)
        return xxhash.xxh3_128_hexdigest(f"{[file.key for file in self.files]} {cut}".encode())

    def skipped_lines(self, first_row: int, skipped: Sequence[tuple[int, int, str]]) -> bytes:
        """What `batches` listed as skipped, as JSON lines, of a part that begins at row `first_row` of its file."""
        keys = ("file", "row", "problem")
        rows = ((self.files[file].name, first_row + row, problem) for file, row, problem in skipped)
        return b"".join(orjson.dumps(dict(zip(keys, row, strict=True))) + b"\n" for row in rows)


def decode(data: bytes, options: ReadOptions) -> str:
    """The text that the bytes stand for. Raises BadInput if they are not UTF-8 and should be, or are no text at all."""
    try:
        text = data.decode(errors="replace" if options.errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        name = magic_name(data)
        if name:
            raise BadInput(f"this is {name}, no UTF-8 text") from None
        raise BadInput(
            f"invalid UTF-8 at byte {error.start} ({error.reason}); --errors replace keeps such text, with U+FFFD for "
            "the bad bytes, and --errors skip leaves it out"
        ) from None
    refuse_binary(text, data)
    return text


def refuse_binary(text: str, data: bytes = b"") -> None:
    """Raise BadInput for what is valid UTF-8, or was made so, and yet no text; `data` is what it was decoded from."""
    num_odd = text.count("\0") + text.count("\ufffd")
    if not num_odd and not data.startswith(LFS_POINTER):
        return
    name = magic_name(data)
    if name:
        raise BadInput(f"this is {name}, no UTF-8 text")
    # In UTF-16 every other byte of an alphabet is the same low number: 0 for Latin, 4 for Cyrillic.
    halves = (text[0:64:2], text[1:64:2])
    if len(text) >= 8 and any(10 * sum(each < "\t" for each in half) >= 9 * len(half) for half in halves):
        raise BadInput("this looks like UTF-16 without a byte order mark, not UTF-8: convert it")
    most = 2 if len(text) < 64 else 3  # a few characters may be a test's, or a table of them
    if len(text) >= 16 and most * num_odd >= len(text):
        raise BadInput(f"{num_odd} of {len(text)} characters are U+FFFD or NUL, so it is no UTF-8 text")


def no_text_error(num_empty: int, num_skipped: int) -> DataError:
    skipped = f"; {num_skipped} rows were skipped, see --check" if num_skipped else ""
    documents = f"{num_empty} documents, all of them empty" if num_empty else "no documents in its files"
    return DataError(f"The input holds no text: {documents}{skipped}.")


def as_text(value: object) -> str:
    """What stands for a value that JSON cannot write: bytes as UTF-8, or else base64; others as Python shows them."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)

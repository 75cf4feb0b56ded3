"""Documents out of JSON lines and text files, plain or compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NoReturn

import orjson

from data_tools.inputs import InputFile
from data_tools.units import Part, ReadOptions, Record, Unit, decode
from megatrain.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 28
"""A longer line or text file is taken for a mistake, or for an attack on memory."""


def read_json_lines(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The lines of a unit, in parts by where they begin. Raises DataError with file and line."""
    file = unit.files[0]
    for number, lines in groupby(_lines(unit, advance), key=lambda line: (line[0] - unit.start) // unit.part_bytes):
        yield Part(number, (_parse_line(file, offset, line, options) for offset, line in lines))


def _lines(unit: Unit, advance: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """The lines that begin within the unit, each with the offset of its first byte in the (decompressed) file."""
    # A line belongs to the unit in which its first byte lies: read from one byte earlier, and drop what ends there.
    skip_first = unit.start > 0
    offset = unit.start - skip_first
    pending: list[bytes] = []
    pending_bytes = 0
    for block in _blocks(unit.files[0], offset, advance):
        if len(block) + pending_bytes > MAX_DOCUMENT_BYTES and b"\n" not in block:
            _fail(unit.files[0], offset, f"the line is longer than {MAX_DOCUMENT_BYTES} bytes")
        pending.append(block)
        pending_bytes += len(block)
        if b"\n" not in block:
            continue
        *lines, rest = b"".join(pending).split(b"\n")
        pending, pending_bytes = [rest], len(rest)
        for line in lines:
            if skip_first:
                skip_first = False
            elif unit.stop is not None and offset >= unit.stop:
                return
            else:
                yield offset, line
            offset += len(line) + 1
    rest = b"".join(pending)
    if rest and not skip_first and (unit.stop is None or offset < unit.stop):
        yield offset, rest


def _blocks(file: InputFile, start: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of the file, decompressed, from the raw offset `start` on."""
    with file.open() as raw:
        try:
            if file.compression == "zstd":
                yield from _zstd_blocks(file, raw, advance)
            elif file.compression == "gzip":
                yield from _gzip_blocks(file, raw, advance)
            else:
                raw.seek(start)
                while block := raw.read(BLOCK_BYTES):
                    advance(len(block))
                    yield block
        except OSError as error:
            raise DataError(f"{file.name} cannot be read: {error}.") from None


def _gzip_blocks(file: InputFile, raw: Any, advance: Callable[[int], None]) -> Iterator[bytes]:
    position = 0
    try:
        with gzip.GzipFile(fileobj=raw) as stream:
            while block := stream.read(BLOCK_BYTES):
                advance(raw.tell() - position)
                position = raw.tell()
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.name} is cut off or damaged: {error}. Download or compress it again.") from None
    if position == 0 and file.num_bytes == 0:
        raise DataError(f"{file.name} is empty, which no gzip file is. Download or compress it again.")


def _zstd_blocks(file: InputFile, raw: Any, advance: Callable[[int], None]) -> Iterator[bytes]:
    import zstandard

    # Small pieces of input bound what one piece can blow up to; `eof` tells a whole frame from one cut off.
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while piece := raw.read(1 << 12):
            advance(len(piece))
            while piece:
                if frame is None or frame.eof:
                    frame = decompressor.decompressobj()
                block = frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                if block:
                    yield block
    except zstandard.ZstdError as error:
        raise DataError(f"{file.name} is damaged or is not zstd: {error}. Download or compress it again.") from None
    if frame is None or not frame.eof:
        raise DataError(f"{file.name} is cut off: its last zstd frame does not end. Download or compress it again.")


def _parse_line(file: InputFile, offset: int, line: bytes, options: ReadOptions) -> Record | None:
    if offset == 0:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        record = _parse_bad_line(file, offset, line, options, error)
    if not isinstance(record, dict):
        _fail(file, offset, f"the line is no JSON object but {line[:40].decode(errors='replace')!r}")
    text = record.get(options.text_key)
    if not isinstance(text, str):
        if options.text_key not in record:
            keys = ", ".join(map(repr, list(record)[:20])) or "none"
            _fail(file, offset, f"the record has no key {options.text_key!r}, its keys are {keys}; see --text-key")
        _fail(file, offset, f"{options.text_key!r} should be text, not {text!r:.40}")
    identity = record.get(options.id_key)
    extra = record if options.whole_records else {}
    for key in (options.text_key, options.id_key):
        extra.pop(key, None)
    return Record(text, identity if identity is None or isinstance(identity, str) else _scalar(identity), 0, extra)


def _parse_bad_line(file: InputFile, offset: int, line: bytes, options: ReadOptions, error: Exception) -> Any:
    """Parse what strict parsing refused, replacing invalid UTF-8 and lone surrogates if that was asked for."""
    try:
        line.decode()
        invalid = "\\u" in str(error) or "surrogate" in str(error)
    except UnicodeDecodeError as decode_error:
        invalid = True
        error = decode_error
    if not invalid:
        _fail(file, offset, f"bad JSON ({error})")
    if options.errors == "strict":
        _fail(file, offset, f"invalid UTF-8 ({error}); --errors replace keeps such text, with U+FFFD for the bad bytes")
    try:
        record = json.loads(line.decode(errors="replace"))
    except ValueError as json_error:
        _fail(file, offset, f"bad JSON ({json_error})")
    if isinstance(record, dict):
        return {key: _without_surrogates(value) for key, value in record.items()}
    return record


def _without_surrogates(value: object) -> object:
    if not isinstance(value, str):
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _scalar(value: object) -> str:
    return orjson.dumps(value).decode()


def _fail(file: InputFile, offset: int, problem: str) -> NoReturn:
    """Raise DataError with the number of the line that begins at `offset`: counted only now, when it is needed."""
    line = 1
    for block in _blocks(file, 0, lambda _: None):
        line += block[: max(offset, 0)].count(b"\n")
        offset -= len(block)
        if offset <= 0:
            break
    raise DataError(f"{file.name}, line {line}: {problem}.")


def read_texts(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Record | None]:
    """Each file of a unit as one document."""
    for index, file in enumerate(unit.files):
        blocks, size = [], 0
        for block in _blocks(file, 0, advance):
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_BYTES:
                raise DataError(f"{file.name} is a text file of more than {MAX_DOCUMENT_BYTES} bytes: one document.")
        yield Record(decode(b"".join(blocks), options, file.name), None, index)

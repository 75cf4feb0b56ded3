"""Documents out of JSON lines and text files, plain or compressed."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

import orjson

from data_tools.inputs import InputFile
from data_tools.units import MAX_DOCUMENT_BYTES, Part, ReadOptions, Record, Unit, decode
from megatrain.errors import DataError

BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 16
"""Read behind a part at once, which most often holds the end of its last line."""
TOO_LONG = f"the line is longer than {MAX_DOCUMENT_BYTES} bytes"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPES = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
"""Escapes in JSON: a pair of surrogates, one without the other, or any other."""


def read_json_lines(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The lines of a unit, in parts by where they begin. Raises DataError with file and line."""
    file = unit.files[0]
    if file.compression:
        for number, offset, data in _compressed_parts(unit, advance):
            yield Part(number, _rows(file, offset, data, 0, len(data), options))
        return
    stop = file.num_bytes if unit.stop is None else unit.stop
    for number, first in enumerate(range(unit.start, stop, unit.part_bytes)):
        yield Part(number, _plain_rows(file, first, min(first + unit.part_bytes, stop), options, advance))


def _plain_rows(
    file: InputFile, start: int, stop: int, options: ReadOptions, advance: Callable[[int], None]
) -> Iterator[Record | None]:
    """The lines whose first byte lies in [start, stop) of a plain file."""
    # The byte before decides whether a line begins at the very start; the last line may end behind the stop.
    first = max(start - 1, 0)
    try:
        with file.open() as raw:
            raw.seek(first)
            data = raw.read(stop - first + LINE_BYTES)
            begin = data.find(b"\n", 0, stop - first) + 1 if start > 0 else 0
            if start > 0 and (begin == 0 or first + begin >= stop):
                return
            end = data.find(b"\n", stop - first - 1) + 1
            if end == 0:
                data += _rest_of_line(file, raw, first + len(data), first + data.rfind(b"\n") + 1)
                end = len(data)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error}.") from None
    advance(stop - start)
    yield from _rows(file, first, data, begin, end, options)


def _rest_of_line(file: InputFile, raw: IO[bytes], position: int, line_start: int) -> bytes:
    """What is left of the line that begins at `line_start`, from `position` of the file on."""
    blocks: list[bytes] = []
    while block := raw.read(BLOCK_BYTES):
        end = block.find(b"\n") + 1
        blocks.append(block[:end] if end else block)
        position += len(blocks[-1])
        if end:
            break
        if position - line_start > MAX_DOCUMENT_BYTES:
            _fail(file, line_start, TOO_LONG)
    return b"".join(blocks)


def _compressed_parts(unit: Unit, advance: Callable[[int], None]) -> Iterator[tuple[int, int, bytes]]:
    """Each part of a compressed file: its number, the offset of its first line, and its lines."""
    file = unit.files[0]
    part_bytes = unit.part_bytes
    offset = position = line_start = 0
    pieces: list[bytes] = []
    for block in _blocks(file, advance):
        while block:
            # The part's last line is the one that holds the byte before the next part's first.
            border = (offset // part_bytes + 1) * part_bytes
            end = block.find(b"\n", max(border - 1 - position, 0)) + 1
            pieces.append(block[:end] if end else block)
            last_newline = pieces[-1].rfind(b"\n")
            if last_newline >= 0:
                line_start = position + last_newline + 1
            position += len(pieces[-1])
            if end:
                yield offset // part_bytes, offset, b"".join(pieces)
                pieces, offset = [], position
            elif position - line_start > MAX_DOCUMENT_BYTES:
                _fail(file, line_start, TOO_LONG)
            block = block[end:] if end else b""
    if pieces:
        yield offset // part_bytes, offset, b"".join(pieces)


def _rows(
    file: InputFile, offset: int, data: bytes, begin: int, end: int, options: ReadOptions
) -> Iterator[Record | None]:
    """The lines of data[begin:end]; `offset` is where the data begin in the (decompressed) file."""
    view = memoryview(data)
    while begin < end:
        line_end = data.find(b"\n", begin, end)
        if line_end < 0:
            line_end = end
        if line_end - begin > MAX_DOCUMENT_BYTES:
            _fail(file, offset + begin, TOO_LONG)
        yield _parse_line(file, offset + begin, view[begin:line_end], options)
        begin = line_end + 1


def _blocks(file: InputFile, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of the file, decompressed."""
    with file.open() as raw:
        try:
            if file.compression == "zstd":
                yield from _zstd_blocks(file, raw, advance)
            elif file.compression == "gzip":
                yield from _gzip_blocks(file, raw, advance)
            else:
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
        if "too much memory" in str(error):
            raise DataError(
                f"{file.name} was compressed with a window of more than 128 MiB (zstd --long), which takes as much "
                "memory to read. Compress it again without."
            ) from None
        raise DataError(f"{file.name} is damaged or is not zstd: {error}. Download or compress it again.") from None
    if frame is None or not frame.eof:
        raise DataError(f"{file.name} is cut off: its last zstd frame does not end. Download or compress it again.")


def _parse_line(file: InputFile, offset: int, line: memoryview, options: ReadOptions) -> Record | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        bare = bytes(line).removeprefix(BYTE_ORDER_MARK) if offset == 0 else bytes(line)
        if not bare.strip():
            return None
        record = _parse_odd_line(file, offset, bare, options)
    if not isinstance(record, dict):
        _fail(file, offset, f"the line is no JSON object but {bytes(line[:40]).decode(errors='replace')!r}")
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


def _parse_odd_line(file: InputFile, offset: int, line: bytes, options: ReadOptions) -> Any:
    """Parse a line without its byte order mark; replace invalid UTF-8 and lone surrogates if that was asked for."""
    error: Exception
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as json_error:
        error = json_error
    try:
        line.decode()
        invalid = "\\u" in str(error) or "surrogate" in str(error)
    except UnicodeDecodeError as decode_error:
        invalid = True
        error = decode_error
    if b"\0" in line and line.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{")):
        _fail(file, offset, "the line is UTF-16, not UTF-8: convert the file")
    if not invalid:
        _fail(file, offset, f"bad JSON ({_in_line(error)})")
    if options.errors == "strict":
        _fail(
            file,
            offset,
            f"invalid UTF-8 ({_in_line(error)}); --errors replace keeps such text, with U+FFFD for the bad bytes",
        )
    try:
        return orjson.loads(_ESCAPES.sub(_without_surrogates, line.decode(errors="replace")))
    except orjson.JSONDecodeError as json_error:
        _fail(file, offset, f"bad JSON ({_in_line(json_error)})")


def _in_line(error: Exception) -> str:
    """What is wrong and in which column: a parser that sees one line calls it line 1."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, orjson.JSONDecodeError) else str(error)


def _without_surrogates(escape: re.Match[str]) -> str:
    return "\\ufffd" if escape["lone"] else escape[0]


def _scalar(value: object) -> str:
    return orjson.dumps(value).decode()


def _fail(file: InputFile, offset: int, problem: str) -> NoReturn:
    """Raise DataError with the number of the line that begins at `offset`: counted only now, when it is needed."""
    line = 1
    for block in _blocks(file, lambda _: None):
        line += block[: max(offset, 0)].count(b"\n")
        offset -= len(block)
        if offset <= 0:
            break
    raise DataError(f"{file.name}, line {line}: {problem}.")


def read_texts(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Record | None]:
    """Each file of a unit as one document."""
    for index, file in enumerate(unit.files):
        blocks, size = [], 0
        for block in _blocks(file, advance):
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_BYTES:
                raise DataError(f"{file.name} is a text file of more than {MAX_DOCUMENT_BYTES} bytes: one document.")
        yield Record(decode(b"".join(blocks), options, file.name), None, index)

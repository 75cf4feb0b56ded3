"""Documents out of JSON and text files, plain or compressed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import orjson

from data_tools.inputs import BYTE_ORDER_MARK, InputFile, are_json_lines, is_object, pop_key
from data_tools.kinds import Kind, kind_of, magic_name
from data_tools.streams import read_blocks
from data_tools.units import (
    MAX_DOCUMENT_BYTES,
    BadInput,
    BadRow,
    Fields,
    Part,
    ReadOptions,
    Record,
    Row,
    Unit,
    decode,
    refuse_binary,
)
from megatrain.errors import DataError

HEAD_BYTES = 1 << 9
LINE_BYTES = 1 << 16
"""Read behind a part at once, which most often holds the end of its last line."""
TOO_LONG = f"the line is longer than {MAX_DOCUMENT_BYTES} bytes"
_ESCAPES = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)
"""Escapes in JSON: a pair of surrogates, one without the other, or any other."""
_BETWEEN = re.compile(r"[\s,]*")
_MISSING = object()


def read_json_lines(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The lines of a unit, in parts; a JSON value that goes over many lines counts as one."""
    file = unit.files[0]
    if file.is_streamed:
        yield from _streamed_parts(unit, options, advance)
        return
    stop = file.num_bytes if unit.stop is None else unit.stop
    for number, first in enumerate(range(unit.start, stop, unit.part_bytes)):
        last = min(first + unit.part_bytes, stop)
        yield Part(number, enumerate(_plain_rows(file, first, last, options, advance)))


def _plain_rows(
    file: InputFile, start: int, stop: int, options: ReadOptions, advance: Callable[[int], None]
) -> Iterator[Row]:
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
            if not end:
                data += raw.readline(MAX_DOCUMENT_BYTES)
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or error}.") from None
    advance(stop - start)
    yield from _rows(file, first, data, options, begin, end or len(data))


def _streamed_parts(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The lines of a file that is read from its start. A part ends with the line that fills it.

    The last part ends with what is wrong with the rest of the file.
    """
    file = unit.files[0]
    data = bytearray()
    number = offset = line_start = 0  # of the part; where it begins in the file; where its last line begins in it
    bad_row = None
    try:
        for block in read_lines(file, advance):
            searched = len(data)
            data += block
            while end := data.find(b"\n", max(unit.part_bytes - 1, searched)) + 1:
                lines = bytes(memoryview(data)[:end])
                del data[:end]
                yield Part(number, enumerate(_rows(file, offset, lines, options)))
                number, offset, line_start, searched = number + 1, offset + end, 0, 0
            line_start = data.rfind(b"\n", searched) + 1 or line_start
            if len(data) - line_start > MAX_DOCUMENT_BYTES:
                bad_row = _bad_row(file, offset + line_start, f"{TOO_LONG}; what follows it in the file is not read")
                break
    except BadInput as error:
        bad_row = BadRow.of(error)
    if bad_row is not None:
        del data[line_start:]
    if data or bad_row is not None:
        yield Part(number, enumerate(chain(_rows(file, offset, bytes(data), options), [bad_row] if bad_row else [])))


def read_lines(file: InputFile, advance: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The bytes of a file of JSON, decompressed, in which each value has a line of its own."""
    blocks = read_blocks(file, advance)
    if file.kind is Kind.JSON_LINES:
        return blocks
    head = next(blocks, b"")
    blocks = chain([head], blocks)
    if magic_name(head):
        raise BadInput(f"{file.name} is {magic_name(head)}, no JSON.")
    return blocks if are_json_lines(head) else _values_in_lines(file, blocks)


def _values_in_lines(file: InputFile, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The values of a JSON array, or values one after another, each on a line of its own."""
    # One character a byte: what is found is cut out of the bytes as it stands, whatever its encoding.
    decoder = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
    text, position, wanted, in_array = "", 0, 0, False
    for number, block in enumerate(chain(blocks, [b""])):
        text, position = text[position:] + block.decode("latin-1"), 0
        if number == 0:
            text = text.removeprefix(BYTE_ORDER_MARK.decode("latin-1")).lstrip()
            position = in_array = text.startswith("[")
        if block and len(text) < wanted:
            continue
        wanted = 0
        while not wanted and (position := _skip_between(text, position)) < len(text) and text[position] != "]":
            try:
                _, end = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if not block or len(text) - position > MAX_DOCUMENT_BYTES:
                    raise BadInput(f"{file.name} is cut off, or no JSON: {_in_line(error)}.") from None
                wanted = 2 * (len(text) - position)  # twice as much, so that a long value is not parsed again and again
            else:
                yield text[position:end].translate(_NO_LINE_ENDS).encode("latin-1") + b"\n"
                position = end
    if in_array and text[position : position + 1] != "]":
        raise BadInput(f"{file.name} is cut off: its array does not end. Download or write it again.")
    if text[position + in_array :].strip():
        raise BadInput(f"{file.name} is no JSON: something follows its array.")


def _skip_between(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


_NO_LINE_ENDS = {ord("\n"): " ", ord("\r"): " "}


def _rows(
    file: InputFile, offset: int, data: bytes, options: ReadOptions, begin: int = 0, end: int | None = None
) -> Iterator[Row]:
    """The lines of data[begin:end]; `offset` is where the data begin in the (decompressed) file."""
    view = memoryview(data)
    end = len(data) if end is None else end
    while begin < end:
        line_end = data.find(b"\n", begin, end)
        if line_end < 0:
            line_end = end
        try:
            if line_end - begin > MAX_DOCUMENT_BYTES:
                raise BadInput(TOO_LONG)
            head = data[:HEAD_BYTES] if offset + begin == 0 else b""
            yield _parse_line(view[begin:line_end], options, head)
        except BadInput as error:
            yield _bad_row(file, offset + begin, str(error))
        begin = line_end + 1


def _parse_line(line: memoryview, options: ReadOptions, head: bytes) -> Record | None:
    """The record of a line; `head` is what the file begins with, if this is its first line."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        bare = bytes(line).removeprefix(BYTE_ORDER_MARK) if head else bytes(line)
        if not bare.strip():
            return None
        record = _parse_odd_line(bare, options, head)
    if not isinstance(record, dict):
        raise BadInput(f"the line is no JSON object but {bytes(line[:40]).decode(errors='replace')!r}")
    keys = ", ".join(map(repr, list(record)[:20])) or "none" if options.text_key not in record else ""
    text = pop_key(record, options.text_key, _MISSING)
    if text is _MISSING:
        raise BadInput(f"the record has no key {options.text_key!r}, its keys are {keys}; see {options.key_option}")
    if isinstance(options.fields, Fields):
        text = options.fields.text([text, *(pop_key(record, key) for key in options.fields.keys)])
    if not isinstance(text, str):
        raise BadInput(f"{options.text_key!r} should be text, not {text!r:.40}")
    refuse_binary(text)
    identity = pop_key(record, options.id_key)
    if identity is not None and not isinstance(identity, str):
        identity = orjson.dumps(identity).decode()
    return Record(text, identity, 0, record if options.whole_records else {})


def _parse_odd_line(line: bytes, options: ReadOptions, head: bytes) -> Any:
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
        raise BadInput("the line is UTF-16, not UTF-8: convert the file")
    name = magic_name(head)
    if name:
        raise BadInput(f"this is {name}, no JSON. Name the file after what it is, or leave it out with --exclude")
    if not invalid:
        raise BadInput(f"bad JSON ({_in_line(error)})")
    if options.errors != "replace":
        raise BadInput(
            f"invalid UTF-8 ({_in_line(error)}); --errors replace keeps such text, with U+FFFD for the bad bytes, and "
            "--errors skip leaves it out"
        )
    try:
        text = line.decode(errors="replace")
        return orjson.loads(_ESCAPES.sub(lambda escape: "\\ufffd" if escape["lone"] else escape[0], text))
    except orjson.JSONDecodeError as json_error:
        raise BadInput(f"bad JSON ({_in_line(json_error)})") from None


def _in_line(error: Exception) -> str:
    """What is wrong and in which column: a parser that sees one line calls it line 1."""
    return f"{error.msg}, column {error.colno}" if isinstance(error, orjson.JSONDecodeError) else str(error)


def _bad_row(file: InputFile, offset: int, problem: str) -> BadRow:
    return BadRow(problem, partial(_with_its_line, file, offset, problem))


def _with_its_line(file: InputFile, offset: int, problem: str) -> BadInput:
    """The error of the line that begins at `offset`: its number is counted only now, when it is needed."""
    line = 1
    for block in read_lines(file):
        line += block[: max(offset, 0)].count(b"\n")
        offset -= len(block)
        if offset <= 0:
            break
    return BadInput(f"{file.name}, {'line' if file.kind is Kind.JSON_LINES else 'record'} {line}: {problem}.")


def read_texts(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    try:
        if options.fields is not None:
            raise BadInput(f"{unit.files[0].name} is a text, which has no {options.text_key!r}; see --include.")
        row: Row = Record(_text(unit.files[0], options, advance), None, 0)
    except BadInput as error:
        row = BadRow.of(error)
    yield Part(0, enumerate([row]))


def _text(file: InputFile, options: ReadOptions, advance: Callable[[int], None]) -> str:
    blocks, size = [], 0
    for block in read_blocks(file, advance):
        blocks.append(block)
        size += len(block)
        if size > MAX_DOCUMENT_BYTES:
            raise BadInput(f"{file.name} is a text file of more than {MAX_DOCUMENT_BYTES} bytes: one document.")
    data = b"".join(blocks)
    is_guess = options.selection.format is None and kind_of(file.name)[0] is None
    if is_guess and data.startswith(b"{") and is_object(data.partition(b"\n")[0]):
        raise BadInput(f"{file.name} has lines of JSON, and a name that does not say so. Give --format jsonl, or text.")
    try:
        return decode(data, options)
    except BadInput as error:
        raise BadInput(f"{file.name}: {error}.") from None

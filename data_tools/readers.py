"""Reading documents out of files of every kind, in pieces that do not depend on who reads them.

A `Unit` is what one worker reads on its own: a byte range of a plain JSON-lines file, a row group of a parquet file, a
whole compressed or Arrow file, or some text files. It comes apart into numbered `Part`s of about PART_BYTES, by where
in the unit a document begins. So the same files give the same parts, whoever reads them, and however often.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_tools.inputs import InputFile, Kind
from megatrain.errors import DataError

PART_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 28
"""A longer line or text file is taken for a mistake, or for an attack on memory."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class ReadOptions:
    """How text is found in records, and what is done with bytes that are not UTF-8 (`strict` or `replace`)."""

    text_key: str = "text"
    id_key: str = "id"
    errors: str = "strict"


class Record(NamedTuple):
    """One document as it stands in a file."""

    text: str
    id: str | None
    file: int
    """Index in the unit's files."""


class Part(NamedTuple):
    """Part number `number` of a unit. Its rows are to be read before the next part is asked for, or not at all."""

    number: int
    rows: Iterator[Record | None]
    """None is a row without a document: a blank line."""


@dataclass(frozen=True)
class Unit:
    """What one worker reads on its own."""

    files: tuple[InputFile, ...]
    start: int = 0
    """First byte (JSON lines) or the row group (parquet)."""
    stop: int | None = None
    """A line that begins at or behind this byte belongs to another unit."""
    num_bytes: int = 0
    """About how many bytes there are to be read; for showing progress."""
    part_bytes: int = PART_BYTES

    @property
    def key(self) -> str:
        """Names the unit's content: the files, their versions, and the range."""
        return xxhash.xxh3_128_hexdigest(
            f"{[file.key for file in self.files]} {self.start} {self.stop} {self.part_bytes}".encode()
        )


def plan_units(files: list[InputFile], part_bytes: int = PART_BYTES) -> Iterator[Unit]:
    """Cut the files into units of about `part_bytes` where they can be read from the middle, in document order."""
    for is_text, group in groupby(files, key=lambda file: file.kind is Kind.TEXT):
        if is_text:
            yield from _group_texts(group, part_bytes)
            continue
        for file in group:
            if file.kind is Kind.PARQUET:
                num_groups = _open_parquet(file).num_row_groups
                group_bytes = file.num_bytes // max(num_groups, 1)
                yield from (Unit((file,), k, None, group_bytes, part_bytes) for k in range(num_groups))
            elif file.kind is Kind.JSON_LINES and file.compression is None:
                for start in range(0, file.num_bytes, part_bytes):
                    stop = min(start + part_bytes, file.num_bytes)
                    yield Unit((file,), start, stop, stop - start, part_bytes)
            else:
                yield Unit((file,), num_bytes=file.num_bytes, part_bytes=part_bytes)


def _group_texts(files: Iterable[InputFile], part_bytes: int) -> Iterator[Unit]:
    group: list[InputFile] = []
    size = 0
    for file in files:
        group.append(file)
        size += file.num_bytes
        if size >= part_bytes or len(group) == ROWS_AT_ONCE:
            yield Unit(tuple(group), num_bytes=size, part_bytes=part_bytes)
            group, size = [], 0
    if group:
        yield Unit(tuple(group), num_bytes=size, part_bytes=part_bytes)


def read_parts(unit: Unit, options: ReadOptions, advance: Callable[[int], None] = lambda _: None) -> Iterator[Part]:
    """The parts of a unit in order; `advance` hears of bytes that were read. Raises DataError with file and place."""
    file = unit.files[0]
    if file.kind is Kind.JSON_LINES:
        return _read_json_lines(unit, options, advance)
    if file.kind is Kind.TEXT:
        return iter([Part(0, _read_texts(unit, options, advance))])
    return _read_tables(unit, options, advance)


# ---- JSON lines and text -------------------------------------------------------------------------------------------


def _read_json_lines(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
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
    return Record(text, identity if identity is None or isinstance(identity, str) else _scalar(identity), 0)


def _parse_bad_line(file: InputFile, offset: int, line: bytes, options: ReadOptions, error: Exception) -> Any:
    """Parse what strict parsing refused, replacing invalid UTF-8 and lone surrogates if that was asked for."""
    import json

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


def _read_texts(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Record | None]:
    for index, file in enumerate(unit.files):
        blocks, size = [], 0
        for block in _blocks(file, 0, advance):
            blocks.append(block)
            size += len(block)
            if size > MAX_DOCUMENT_BYTES:
                raise DataError(f"{file.name} is a text file of more than {MAX_DOCUMENT_BYTES} bytes: one document.")
        yield Record(_decode(b"".join(blocks), options, file.name), None, index)


def _decode(data: bytes, options: ReadOptions, place: str) -> str:
    try:
        return data.decode(errors=options.errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: invalid UTF-8 at byte {error.start} ({error.reason}); "
            "--errors replace keeps such text, with U+FFFD for the bad bytes."
        ) from None


# ---- Parquet and Arrow ---------------------------------------------------------------------------------------------


def _read_tables(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    file = unit.files[0]
    if file.kind is Kind.PARQUET:
        first_row, batches = _parquet_batches(file, unit.start, options)
    else:
        first_row, batches = 0, _arrow_batches(file, options)
    placed = _placed(_guarded(file, batches), first_row)
    for number, group in groupby(placed, key=lambda each: each[0] // unit.part_bytes):
        yield Part(number, _table_rows(file, group, options, advance))


def _guarded(file: InputFile, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name} is cut off or damaged: {error}. Download or write it again.") from None


def _placed(batches: Iterator[pa.RecordBatch], row: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Each batch, with the bytes before it in the unit and the rows before it in the file."""
    position = 0
    for batch in batches:
        yield position, row, batch
        position += batch.nbytes
        row += batch.num_rows


def _table_rows(
    file: InputFile,
    placed: Iterable[tuple[int, int, pa.RecordBatch]],
    options: ReadOptions,
    advance: Callable[[int], None],
) -> Iterator[Record | None]:
    for _, first_row, batch in placed:
        texts = _binary(batch.column(options.text_key), options.text_key, file)
        has_ids = options.id_key in batch.schema.names and options.id_key != options.text_key
        ids = batch.column(options.id_key).to_pylist() if has_ids else [None] * len(texts)
        for row, (text, identity) in enumerate(zip(texts.to_pylist(), ids, strict=True), start=first_row):
            if text is None:
                raise DataError(f"{file.name}, row {row}: {options.text_key!r} should be text, not null.")
            known = identity is None or isinstance(identity, str)
            yield Record(_decode(text, options, f"{file.name}, row {row}"), identity if known else str(identity), 0)
        advance(batch.nbytes)


def _binary(column: pa.Array, name: str, file: InputFile) -> pa.Array:
    """A text column as bytes: Arrow does not check that text is UTF-8, and neither does this."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.type not in (pa.string(), pa.large_string(), pa.string_view()):
        raise DataError(f"{file.name}: the column {name!r} holds {column.type}, not text.")
    try:
        column = column.cast(pa.large_binary())
        column.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{file.name}: the column {name!r} is damaged: {error}.") from None
    return column


def _columns(names: list[str], options: ReadOptions, file: InputFile) -> list[str]:
    if options.text_key not in names:
        listed = ", ".join(map(repr, names[:20]))
        raise DataError(f"{file.name} has no column {options.text_key!r}, its columns are {listed}; see --text-key.")
    return [options.text_key, *({options.id_key} & set(names) - {options.text_key})]


def _open_parquet(file: InputFile) -> pq.ParquetFile:
    if file.compression:
        raise DataError(f"{file.name} is a compressed parquet file, which cannot be read in place: decompress it.")
    try:
        source = file.open() if file.is_remote else file.name
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name} is no whole parquet file: {error}. Download or write it again.") from None


def _parquet_batches(file: InputFile, group: int, options: ReadOptions) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The first row of a row group in the file, and the row group in batches."""
    parquet = _open_parquet(file)
    columns = _columns(parquet.schema_arrow.names, options, file)
    first_row = sum(parquet.metadata.row_group(k).num_rows for k in range(group))
    return first_row, parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)


def _arrow_batches(file: InputFile, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    if file.compression:
        raise DataError(f"{file.name} is a compressed Arrow file, which cannot be read in place: decompress it.")
    if file.num_bytes == 0:
        raise DataError(f"{file.name} is empty: no Arrow data. Download or write it again.")
    with file.open() as head:
        is_file = head.read(6) == b"ARROW1"
    source = file.open() if file.is_remote else pa.memory_map(file.name)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    columns = _columns(reader.schema.names, options, file)
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    for batch in batches:
        yield from _slices(batch.select(columns))


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        yield batch.slice(start, ROWS_AT_ONCE)

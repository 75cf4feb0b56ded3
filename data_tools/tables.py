"""Documents out of parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.inputs import InputFile, Kind
from data_tools.units import MAX_DOCUMENT_BYTES, Part, ReadOptions, Record, Unit, decode
from megatrain.errors import DataError

ROWS_AT_ONCE = 16
"""In memory at a time, so few because of dictionaries: a million rows may all be the same document of 100 MB."""
MAX_GROWTH = 1000


def read_tables(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The rows of a unit, in parts by the size of what is before them. Raises DataError with file and row."""
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
        yield from map(_plain, batches)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.name} is cut off or damaged: {_reason(error)}. Download or write it again.") from None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch without dictionaries, so that its size is that of what it stands for."""
    is_dictionary = list(map(pa.types.is_dictionary, batch.schema.types))
    if not any(is_dictionary):
        return batch
    columns = [c.dictionary_decode() if found else c for c, found in zip(batch.columns, is_dictionary, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _reason(error: Exception) -> str:
    """What the library says is wrong, without a full stop of its own."""
    return " ".join(str(error).split()).rstrip(".")


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
        texts = _texts(batch, first_row, options, file)
        columns = (texts, _ids(batch, options, file), _extras(batch, options, f"{file.name}, row {first_row}"))
        for row, (text, identity, extra) in enumerate(zip(*columns, strict=True), start=first_row):
            if text is None:
                raise DataError(f"{file.name}, row {row}: {options.text_key!r} should be text, not null.")
            if isinstance(identity, bytes):
                identity = decode(identity, options, file.name, row)
            document = decode(text, options, file.name, row)
            yield Record(document, None if identity is None else str(identity), 0, extra)
        advance(batch.nbytes)


def _texts(batch: pa.RecordBatch, first_row: int, options: ReadOptions, file: InputFile) -> list[bytes | None]:
    column = _binary(batch.column(options.text_key), options.text_key, file)
    if column.nbytes > MAX_DOCUMENT_BYTES:
        lengths = pc.binary_length(column).fill_null(0).to_numpy()
        if lengths.max() > MAX_DOCUMENT_BYTES:
            row = first_row + int(lengths.argmax())
            raise DataError(f"{file.name}, row {row}: the text is longer than {MAX_DOCUMENT_BYTES} bytes.")
    texts: list[bytes | None] = column.to_pylist()
    return texts


def _ids(batch: pa.RecordBatch, options: ReadOptions, file: InputFile) -> list[object]:
    """The ids of a batch: bytes where the column is text, for the same reason as the text's."""
    if options.id_key not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(options.id_key)
    try:
        ids: list[object] = (_binary(column, options.id_key, file) if _is_text(column) else column).to_pylist()
    except (ValueError, OverflowError) as error:
        raise DataError(f"{file.name}: the column {options.id_key!r} cannot be read ({error}).") from None
    return ids


def _extras(batch: pa.RecordBatch, options: ReadOptions, place: str) -> list[dict[str, Any]]:
    """The other columns of a batch, row by row."""
    names = [name for name in batch.schema.names if name not in (options.text_key, options.id_key)]
    try:
        rows: list[dict[str, Any]] = batch.select(names).to_pylist() if names else [{}] * batch.num_rows
    except (ValueError, OverflowError) as error:
        raise DataError(f"{place} or soon after: a column beside the text cannot be read ({error}).") from None
    return rows


def _is_text(column: pa.Array) -> bool:
    return column.type in (pa.string(), pa.large_string(), pa.string_view())


def _binary(column: pa.Array, name: str, file: InputFile) -> pa.Array:
    """A text column as bytes: Arrow does not check that text is UTF-8, and neither does this."""
    if not _is_text(column):
        raise DataError(f"{file.name}: the column {name!r} holds {column.type}, not text.")
    try:
        column = column.cast(pa.large_binary())
        column.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{file.name}: the column {name!r} is damaged: {_reason(error)}.") from None
    return column


def _columns(names: list[str], options: ReadOptions, file: InputFile) -> list[str]:
    if options.text_key not in names:
        listed = ", ".join(map(repr, names[:20]))
        raise DataError(f"{file.name} has no column {options.text_key!r}, its columns are {listed}; see --text-key.")
    wanted = set(names) if options.whole_records else {options.text_key, options.id_key}
    columns = [name for name in names if name in wanted]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file.name} has more than one column {twice!r}: rename them, or leave out all but one.")
    return columns


def open_parquet(file: InputFile) -> pq.ParquetFile:
    """The file, its footer read. Raises DataError where there is none."""
    if file.compression:
        raise DataError(f"{file.name} is a compressed parquet file, which cannot be read in place: decompress it.")
    try:
        source = file.open() if file.is_remote else file.name
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.name} is no whole parquet file: {_reason(error)}. Download or write it again."
        ) from None


def _parquet_batches(file: InputFile, group: int, options: ReadOptions) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The first row of a row group in the file, and the row group in batches."""
    parquet = open_parquet(file)
    columns = _columns(parquet.schema_arrow.names, options, file)
    first_row = sum(parquet.metadata.row_group(k).num_rows for k in range(group))
    _refuse_bomb(file, parquet.metadata.row_group(group), columns)
    return first_row, parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)


def _refuse_bomb(file: InputFile, group: pq.RowGroupMetaData, columns: list[str]) -> None:
    """Text compresses some ten times; what says that it will grow a thousandfold is made to fill the memory."""
    for chunk in (group.column(i) for i in range(group.num_columns)):
        grown_bytes = chunk.total_uncompressed_size
        if chunk.path_in_schema in columns and grown_bytes > max(
            MAX_DOCUMENT_BYTES, MAX_GROWTH * chunk.total_compressed_size
        ):
            raise DataError(
                f"{file.name}: {chunk.total_compressed_size} bytes of the column {chunk.path_in_schema!r} would "
                f"decompress to {grown_bytes}, which no text does. Write it again in smaller row groups if it is meant."
            )


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

"""Documents out of tables: parquet, Arrow and CSV files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from data_tools.inputs import InputFile, misnamed, pop_key
from data_tools.kinds import Kind, magic_name
from data_tools.stores import StoreError
from data_tools.streams import BLOCK_BYTES, read_blocks
from data_tools.units import MAX_DOCUMENT_BYTES, BadInput, BadRow, Part, ReadOptions, Record, Row, Unit, as_text, decode
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import FORMAT_NAME
from megatrain.data.shard import Views
from megatrain.errors import DataError

ROWS_AT_ONCE = 16
"""In memory at a time, so few because of dictionaries: a million rows may all be the same document of 100 MB."""
MAX_GROWTH = 1000
CSV_BLOCK_BYTES = 1 << 25
"""A row of CSV is no longer than this."""
CSV_END = b"\x1e\x1f\x1d"
"""What every column has in a row that is put behind the file."""


def read_tables(unit: Unit, options: ReadOptions, advance: Callable[[int], None]) -> Iterator[Part]:
    """The rows of a unit, in parts by the size of what is before them."""
    file = unit.files[0]
    for number, group in groupby(_placed(unit, options), key=lambda each: each[0] // unit.part_bytes):
        yield Part(number, enumerate(_table_rows(file, group, options, advance)))


def _placed(unit: Unit, options: ReadOptions) -> Iterator[tuple[int, int, pa.RecordBatch | BadRow]]:
    """Each batch, or at last what is wrong with the rest; the bytes before it in the unit and the rows in the file."""
    file = unit.files[0]
    position = row = 0
    try:
        if file.kind is Kind.PARQUET:
            row, batches = _parquet_batches(unit, options)
        else:
            batches = _arrow_batches(file, options) if file.kind is Kind.ARROW else _csv_batches(file, options)
        for batch in batches:
            batch = batch if isinstance(batch, BadRow) else _plain(batch)
            yield position, row, batch
            position += 0 if isinstance(batch, BadRow) else batch.nbytes
            row += 0 if isinstance(batch, BadRow) else batch.num_rows
    except (BadInput, OSError, pa.ArrowException) as error:
        damage = _damage(file, error)
        if not isinstance(damage, BadInput):
            raise damage from None
        yield position, row, BadRow.of(damage)


def _damage(file: InputFile, error: Exception) -> DataError:
    """What to say of an error: BadInput, unless it is the disk or the store that failed."""
    if isinstance(error, DataError):
        return error
    if isinstance(error, StoreError) or (isinstance(error, OSError) and error.errno is not None):
        return DataError(f"{file.name} cannot be read: {getattr(error, 'strerror', None) or error}.")
    if problem := misnamed(file, file.kind.value):
        return BadInput(problem)
    if "straddling" in str(error):
        return BadInput(f"{file.name} has a row of more than {CSV_BLOCK_BYTES} bytes, or a quote that does not end.")
    whole = "is no whole parquet file" if file.kind is Kind.PARQUET else "is cut off or damaged"
    return BadInput(f"{file.name} {whole}: {_reason(error)}. Download or write it again.")


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


def _table_rows(
    file: InputFile,
    placed: Iterable[tuple[int, int, pa.RecordBatch | BadRow]],
    options: ReadOptions,
    advance: Callable[[int], None],
) -> Iterator[Row]:
    for _, first_row, batch in placed:
        if isinstance(batch, BadRow):
            yield batch
            continue
        try:
            texts = (
                _text_column(batch, options.text_key, file)
                if options.fields is None
                else _values_of(batch, options, file)
            )
            columns = (texts, _ids(batch, options, file), _extras(batch, options, file))
        except BadInput as error:
            yield from [BadRow.of(error)] * batch.num_rows
            continue
        for row, (text, identity, extra) in enumerate(zip(*columns, strict=True), start=first_row):
            try:
                identity = decode(identity, options) if isinstance(identity, bytes) else identity
                if options.fields is None:
                    yield Record(_document(text, options), identity, 0, extra)
                else:
                    yield options.fields.record(text, identity, extra)
            except BadInput as error:
                yield BadRow(str(error), partial(BadInput, f"{file.name}, row {row}: {error}."))
        advance(batch.nbytes)


def _document(text: pa.Scalar, options: ReadOptions) -> str:
    buffer = text.as_buffer()
    if buffer is None:
        raise BadInput(f"{options.text_key!r} should be text, not null")
    if buffer.size > MAX_DOCUMENT_BYTES:
        raise BadInput(f"the text is longer than {MAX_DOCUMENT_BYTES} bytes")
    return decode(buffer.to_pybytes(), options)


def _field(rows: pa.StructArray, key: str) -> pa.Array | None:
    """The column of a key; of a key `a.b` it is the field `b` of the structs in column `a`."""
    names = [field.name for field in rows.type]
    outer, _, inner = (key, "", "") if key in names else key.partition(".")
    if outer not in names:
        return None
    column = pc.struct_field(rows, [names.index(outer)])
    if not inner:
        return column if key in names else None
    return _field(column, inner) if pa.types.is_struct(column.type) else None


def _ids(batch: pa.RecordBatch, options: ReadOptions, file: InputFile) -> list[Any]:
    """The ids of a batch: bytes where the column is text, for the same reason as the text's."""
    column = _field(batch.to_struct_array(), options.id_key)
    if column is None:
        return [None] * batch.num_rows
    if _is_text(column.type):
        ids: list[Any] = _as_bytes(column, options.id_key, file).to_pylist()
        return ids
    values = _values(column, options.id_key, file)
    return [value if value is None else as_text(value) for value in values]


def _extras(batch: pa.RecordBatch, options: ReadOptions, file: InputFile) -> list[dict[str, Any]]:
    if not options.whole_records:
        return [{}] * batch.num_rows
    keys = (options.text_key, options.id_key)
    columns = {name: _values(batch.column(name), name, file) for name in batch.schema.names if name not in keys}
    rows: list[dict[str, Any]] = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    for row in rows:
        for key in keys:
            pop_key(row, key)
    return rows or [{} for _ in range(batch.num_rows)]


def _values_of(batch: pa.RecordBatch, options: ReadOptions, file: InputFile) -> list[list[Any]]:
    """The values of each row; tables fill structs up with nulls, which are left out."""
    columns = [(key, _field(batch.to_struct_array(), key)) for key in options.keys]
    values = [[None] * batch.num_rows if column is None else _values(column, key, file) for key, column in columns]
    return [[_without_null(value) for value in row] for row in zip(*values, strict=True)]


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value


def _values(column: pa.Array, name: str, file: InputFile) -> list[Any]:
    """A column's values as JSON has them. Times to the nanosecond, NaN and infinities, which it has not, are text."""
    try:
        readable = _readable(column.type)
        values: list[Any] = (column if readable == column.type else column.cast(readable)).to_pylist()
    except (ValueError, OverflowError, NotImplementedError, pa.ArrowException) as error:
        raise BadInput(
            f"{file.name}: the column {name!r} cannot be read ({_reason(error)}). Leave it out, or write it as text."
        ) from None
    has_floats = any(name in str(column.type) for name in ("float", "double"))
    return [_finite(value) for value in values] if has_floats else values


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type with text in place of what has nanoseconds, for which Python has no type of its own."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_readable(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_readable(kind.key_type), _readable(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_readable(kind.value_type))
        return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner, getattr(kind, "list_size", -1))
    has_nanoseconds = pa.types.is_temporal(kind) and getattr(kind, "unit", "") == "ns"
    return pa.string() if has_nanoseconds else kind


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or pa.types.is_fixed_size_binary(kind)


def _text_column(batch: pa.RecordBatch, key: str, file: InputFile) -> pa.Array:
    column = _field(batch.to_struct_array(), key)
    if column is None:
        raise BadInput(f"{file.name}: the column {key.partition('.')[0]!r} has no field {key.partition('.')[2]!r}.")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not _is_text(column.type) and not _is_binary(column.type):
        raise BadInput(f"{file.name}: the column {key!r} holds {column.type}, not text.")
    return _as_bytes(column, key, file)


def _as_bytes(column: pa.Array, name: str, file: InputFile) -> pa.Array:
    """Text as bytes: Arrow does not check that text is UTF-8, and neither does this."""
    try:
        column = column.cast(pa.large_binary())
        column.validate(full=True)
    except pa.ArrowException as error:
        raise BadInput(f"{file.name}: the column {name!r} is damaged: {_reason(error)}.") from None
    return column


def _columns(names: list[str], options: ReadOptions, file: InputFile) -> list[str]:
    """The columns to read, of those that there are; of a column of structs the field that is wanted alone."""
    tops = {key: key if key in names else key.partition(".")[0] for key in (*options.keys, options.id_key)}
    if tops[options.text_key] not in names:
        listed = ", ".join(map(repr, names[:20]))
        raise BadInput(
            f"{file.name} has no column {options.text_key!r}, its columns are {listed}; see {options.key_option}."
        )
    wanted = names if options.whole_records else [key for key, top in tops.items() if top in names]
    twice = next((name for name in wanted if names.count(tops.get(name, name)) > 1), None)
    if twice is not None:
        raise BadInput(f"{file.name} has more than one column {twice!r}: rename them, or leave out all but one.")
    return [name for name in names if name in wanted] + [name for name in wanted if name not in names]


@lru_cache(maxsize=2)
def _footer(file: InputFile) -> tuple[pq.FileMetaData, list[int]]:
    """A parquet file's footer, which its units share, and the first row of each of its row groups."""
    parquet = _open_parquet(file, None)
    groups = range(parquet.metadata.num_row_groups)
    return parquet.metadata, [0, *accumulate(parquet.metadata.row_group(k).num_rows for k in groups)]


def _open_parquet(file: InputFile, footer: pq.FileMetaData | None) -> pq.ParquetFile:
    if file.compression:
        raise BadInput(f"{file.name} is a compressed parquet file, which cannot be read in place: decompress it.")
    try:
        source = file.open() if file.path is None else str(file.path)
        return pq.ParquetFile(source, metadata=footer, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise _damage(file, error) from None


def row_group_ranges(file: InputFile, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Row groups [first, last) that are about a part together, and their bytes in the file."""
    footer = _footer(file)[0]
    sizes = [footer.row_group(k).total_byte_size for k in range(footer.num_row_groups)]
    first = size = 0
    for last, each in enumerate([*sizes, part_bytes]):
        if last > first and size + each > part_bytes:
            yield first, last, file.num_bytes * size // max(sum(sizes), 1)
            first, size = last, 0
        size += each


def _parquet_batches(unit: Unit, options: ReadOptions) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The first row of a unit in its file, and its row groups in batches."""
    file = unit.files[0]
    footer, first_rows = _footer(file)
    parquet = _open_parquet(file, footer)
    columns = _columns(parquet.schema_arrow.names, options, file)
    groups = range(unit.start, footer.num_row_groups if unit.stop is None else unit.stop)
    for group in groups:
        _refuse_bomb(file, footer.row_group(group), columns)
    return first_rows[unit.start], parquet.iter_batches(
        ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False
    )


def _refuse_bomb(file: InputFile, group: pq.RowGroupMetaData, columns: list[str]) -> None:
    """Text compresses some ten times; what says that it will grow a thousandfold is made to fill the memory."""
    for chunk in (group.column(i) for i in range(group.num_columns)):
        grown_bytes = chunk.total_uncompressed_size
        if grown_bytes > max(MAX_DOCUMENT_BYTES, MAX_GROWTH * chunk.total_compressed_size) and any(
            f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns
        ):
            raise BadInput(
                f"{file.name}: {chunk.total_compressed_size} bytes of the column {chunk.path_in_schema!r} would "
                f"decompress to {grown_bytes}, which no text does. Write it again in smaller row groups if it is meant."
            )


def _arrow_batches(file: InputFile, options: ReadOptions) -> Iterator[pa.RecordBatch]:
    if file.compression:
        raise BadInput(f"{file.name} is a compressed Arrow file, which cannot be read in place: decompress it.")
    if file.num_bytes == 0:
        raise BadInput(f"{file.name} is empty: no Arrow data. Download or write it again.")
    with file.open() as head:
        is_file = head.read(6) == b"ARROW1"
    source = file.open() if file.path is None else pa.memory_map(str(file.path))
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    names = reader.schema.names
    batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
    if (
        file.path is not None
        and "tokens" in names
        and FORMAT_NAME.encode() in (reader.schema.metadata or {}).get(b"megatrain", b"")
    ):
        names = [options.text_key, options.id_key]
        batches = map(partial(_texts_of_shard, file.path, options), batches)
    columns = {name if name in names else name.partition(".")[0] for name in _columns(names, options, file)}
    for batch in batches:
        yield from _slices(batch.select([name for name in names if name in columns]))


def _texts_of_shard(path: Path, options: ReadOptions, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The documents of a shard of a tokenized dataset as text."""
    dataset = _dataset_of(path.parent)
    tokens, offsets = Views.of(batch)
    texts = [dataset.text_of(tokens[a:b]) for a, b in pairwise(offsets.tolist())]
    return pa.RecordBatch.from_pydict({options.text_key: texts, options.id_key: batch["id"]})


@lru_cache(maxsize=1)
def _dataset_of(folder: Path) -> Dataset:
    return open_dataset(folder)


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
        yield batch.slice(start, ROWS_AT_ONCE)


class _Stream(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._blocks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _csv_batches(file: InputFile, options: ReadOptions) -> Iterator[pa.RecordBatch | BadRow]:
    """The rows behind the line with the columns' names; every value is text."""
    invalid: list[BadRow] = []

    def leave_out(row: Any) -> str:
        problem = f"the row has {row.actual_columns} columns, not {row.expected_columns}: {row.text:.40}"
        invalid.append(BadRow(problem, partial(BadInput, f"{file.name}: {problem}.")))
        return "skip"

    parse = pyarrow.csv.ParseOptions(
        delimiter="\t" if file.kind is Kind.TSV else ",",
        newlines_in_values=True,
        invalid_row_handler=leave_out if options.errors == "skip" else None,
    )
    stream = io.BufferedReader(_Stream(read_blocks(file)), BLOCK_BYTES)
    header, _, rest = stream.readline(BLOCK_BYTES).partition(b"\r")  # which may be all that ends a line
    if not header.strip():
        return
    if magic_name(header):
        raise pa.ArrowInvalid("no text")  # which names what it is
    # Not `open_csv`: threads of an abandoned reader have been seen to abort the process at exit.
    in_order = pyarrow.csv.ReadOptions(use_threads=False)
    names = pyarrow.csv.read_csv(io.BytesIO(header + b"\n"), in_order, parse).schema.names
    columns = _columns(names, options, file)
    end = b"\n" + parse.delimiter.encode().join([CSV_END] * len(names)) + b"\n"
    with pyarrow.csv.open_csv(
        io.BufferedReader(
            _Stream(chain([rest] if rest else [], iter(partial(stream.read1, BLOCK_BYTES), b""), [end])), BLOCK_BYTES
        ),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=names),
        parse,
        pyarrow.csv.ConvertOptions(
            check_utf8=False, column_types=dict.fromkeys(names, pa.string()), include_columns=columns
        ),
    ) as reader:
        last = None
        for batch in reader:
            yield from _slices(last) if last else ()
            last = batch
    ends = [column[-1].as_buffer().to_pybytes() for column in last.columns] if last else []
    if last:
        # Behind a quote that does not end all that follows is in its value, and so is CSV_END.
        yield from _slices(last.slice(0, last.num_rows - any(CSV_END in each for each in ends)))
    yield from invalid
    if any(each != CSV_END for each in ends):
        raise BadInput(f"{file.name} is cut off, or a quote in it does not end. Download or write it again.")

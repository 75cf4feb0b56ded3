"""A dataset as large as one likes whose tokens are holes in its files: its size on disk is a few pages a shard.

Every shard has two documents of equal length, a record batch each, all zeros but for the first two tokens of a document
(the shard's number, low and high 16 bits) and its last, the end-of-document token. Checksums are left zero: nothing
could read 2 TB of holes to compute them, and reading windows does not look at them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatrain.data.format import (
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    SHARD_TABLE_SCHEMA,
    Manifest,
    document_schema,
    file_checksum,
    shard_name,
)
from megatrain.data.shard_table import shard_row

EOD_ID = 65_535
PAGE_BYTES = 4096


def write_sparse_dataset(folder: Path, num_shards: int, tokens_per_shard: int) -> None:
    """Write a whole dataset of uint16 tokens: shards, their table, the manifest."""
    folder.mkdir(parents=True)
    template = folder / "template"
    _write_template(template, tokens_per_shard)
    row = shard_row(template, 2, tokens_per_shard, 2 * tokens_per_shard)
    data = template.read_bytes()
    pages = np.frombuffer(data.ljust(-(-len(data) // PAGE_BYTES) * PAGE_BYTES, b"\0"), np.uint8)
    used = np.flatnonzero(pages.reshape(-1, PAGE_BYTES).any(axis=1)).tolist()
    pieces = [(page * PAGE_BYTES, data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]) for page in used]
    tokens = np.frombuffer(data, np.uint8)
    begins = [_first_token(template, number) for number in range(2)]
    assert not tokens[begins[0] : begins[0] + 4].any()
    template.unlink()
    for index in range(num_shards):
        file = os.open(folder / shard_name(index), os.O_CREAT | os.O_WRONLY, 0o644)
        os.ftruncate(file, len(data))
        for start, piece in pieces:
            os.pwrite(file, piece, start)
        for begin in begins:
            os.pwrite(file, np.array([index & 0xFFFF, index >> 16], "<u2").tobytes(), begin)
        os.close(file)
    _write_table(folder / SHARD_TABLE_FILE, row, num_shards)
    manifest = Manifest(
        digest="0" * 64,
        num_shards=num_shards,
        num_documents=2 * num_shards,
        num_tokens=num_shards * tokens_per_shard,
        text_bytes=2 * num_shards * tokens_per_shard,
        num_empty_documents=0,
        dtype="uint16",
        vocab_size=65_536,
        eod_id=EOD_ID,
        eod_token="<|endoftext|>",
        tokenizer_sha256="0" * 64,
        options={},
        job="sparse",
        shard_table_checksum=file_checksum(folder / SHARD_TABLE_FILE).hex(),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.dump())


def _write_template(path: Path, num_tokens: int) -> None:
    half = num_tokens // 2
    tokens = np.zeros(half, np.uint16)
    tokens[-1] = EOD_ID
    schema = document_schema(np.dtype(np.uint16))
    source = [pa.array(["a.jsonl"]), pa.array([0], pa.uint64())]
    columns = [
        pa.LargeListArray.from_arrays(np.array([0, half]), pa.array(tokens), type=schema.field("tokens").type),
        pa.array(["a"]),
        pa.array([bytes(16)], pa.binary(16)),
        pa.StructArray.from_arrays(source, fields=list(schema.field("source").type)),
        pa.array([num_tokens], pa.uint64()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)


def _first_token(path: Path, batch: int) -> int:
    """Byte of the file at which the tokens of a record batch begin."""
    with pa.memory_map(str(path)) as source:
        data = source.read_buffer()
        values = pa.ipc.open_file(data).get_batch(batch).column(0).values
        return int(values.buffers()[1].address - data.address)


def _write_table(path: Path, row: dict[str, object], num_shards: int) -> None:
    one = pa.array(
        [{**batch, "checksum": bytes(16)} for batch in row["batches"]], SHARD_TABLE_SCHEMA[-1].type.value_type
    )
    every = one.take(pa.array(np.tile(np.arange(len(one)), num_shards)))
    batches = pa.ListArray.from_arrays(
        np.arange(num_shards + 1, dtype=np.int32) * len(one), every, type=SHARD_TABLE_SCHEMA[-1].type
    )
    counts = [pa.array(np.full(num_shards, row[name], np.int64)) for name in SHARD_TABLE_SCHEMA.names[:4]]
    checksums = pa.array([bytes(16)] * num_shards, pa.binary(16))
    table = pa.RecordBatch.from_arrays([*counts, checksums, batches], schema=SHARD_TABLE_SCHEMA)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_batch(table)

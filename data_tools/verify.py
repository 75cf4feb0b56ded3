"""Checking every byte of a dataset, and saying where it is not what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_tools.work import Advance
from megatrain.data.dataset import Shard, read_shard_table
from megatrain.data.format import TOKENIZER_FILE, Manifest, checksum, content_digest, shard_name
from megatrain.errors import DataError

MAX_REPORTED = 10


def verify_dataset(folder: Path, progress: Callable[[str, int], AbstractContextManager[Advance]]) -> Manifest:
    """Check all files of a dataset: checksums, structure, each document's hash, and the digest computed anew.

    Raises DataError that names every damaged file; in a shard also record batch, document and bytes where they show.
    """
    manifest = Manifest.load(folder)
    problems: list[str] = []
    tokenizer = folder / TOKENIZER_FILE
    try:
        if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            problems.append(f"{tokenizer}: its SHA-256 is not the one in the manifest")
    except OSError as error:
        problems.append(f"{tokenizer} cannot be read: {error.strerror}")
    rows = read_shard_table(folder, manifest).to_pylist()
    with progress("verify", sum(row["bytes"] for row in rows)) as advance:
        hashes = _checked_hashes(folder, manifest, rows, problems, advance)
        digest = content_digest(manifest.tokenizer_sha256, manifest.options, hashes)
    if not problems and digest != manifest.digest:
        problems.append(f"{folder}: the digest of its documents is {digest}, the manifest says {manifest.digest}")
    if problems:
        more = f" (and {len(problems) - MAX_REPORTED} more)" if len(problems) > MAX_REPORTED else ""
        listed = "; ".join(problems[:MAX_REPORTED])
        raise DataError(f"{folder} is damaged: {listed}{more}. Copy these files again, or tokenize again.")
    return manifest


def _checked_hashes(
    folder: Path, manifest: Manifest, rows: list[dict[str, Any]], problems: list[str], advance: Advance
) -> Iterator[pa.Array]:
    """The hash columns of all shards, in order; what is wrong with a shard is added to `problems`."""
    for index, row in enumerate(rows):
        path = folder / shard_name(index)
        try:
            buffer = pa.memory_map(str(path)).read_buffer()
            is_whole = checksum(buffer) == row["checksum"]
            shard = Shard.read(path, buffer, np.dtype(manifest.dtype), row["documents"], row["tokens"], row["bytes"])
        except (OSError, DataError) as error:
            problems.append(f"{path} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error))
            continue
        found = [
            f"{path}, record batch {number}: {problem}"
            for number, batch in enumerate(shard.batches)
            for problem in [_batch_problem(shard, number, batch, manifest, buffer.address)]
            if problem
        ]
        if not is_whole and not found:
            found = [f"{path}: its checksum is not the one that was written, though its tokens are whole"]
        problems += found
        yield from (batch["hash"] for batch in shard.batches)
        advance(row["bytes"])


def _batch_problem(
    shard: Shard, number: int, batch: pa.RecordBatch, manifest: Manifest, file_address: int
) -> str | None:
    """The first thing wrong with a record batch of a shard, with its place."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        return str(error)
    tokens, offsets = shard.values[number], shard.offsets[number]
    if np.any(np.diff(offsets) < 1):
        return "it has a document without tokens"
    first_document = shard.document_starts[number]
    data = tokens.data.cast("B")
    borders = (offsets * tokens.itemsize).tolist()
    hashes = batch["hash"].to_pylist()
    for document, ((first, last), written) in enumerate(zip(pairwise(borders), hashes, strict=True), first_document):
        if xxhash.xxh3_128_digest(data[first:last]) != written:
            start = tokens.ctypes.data - file_address
            return (
                f"document {document} of the shard (tokens in bytes {start + first} to {start + last}) has another hash"
            )
    ends = np.flatnonzero(tokens == manifest.eod_id)
    if not np.array_equal(ends, offsets[1:] - 1):
        return "the end-of-document token is not the last of every document, and only there"
    if int(tokens.max(initial=0)) >= manifest.vocab_size:
        return f"it holds a token above the vocabulary of {manifest.vocab_size}"
    return None

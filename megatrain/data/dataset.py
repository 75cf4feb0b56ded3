"""Reading a tokenised dataset: memory-mapped, opened in milliseconds whatever its size.

Opening reads the manifest and the table of shards. A shard is mapped when it is first needed, and the NumPy views of
its record batches are taken once: a window is then two bisections and a slice. Nothing is locked and nothing is written
after that but the table of mapped shards, so a dataset may be used from many threads, and after a fork.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from megatrain.data.format import (
    SHARD_TABLE_FILE,
    SHARD_TABLE_SCHEMA,
    TOKENIZER_FILE,
    Manifest,
    checksum,
    document_schema,
    shard_name,
)
from megatrain.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]

MAX_MAPPED_SHARDS = 1024
"""A process may map some 65,000 regions (vm.max_map_count), and a dataset may have more shards than that."""


def open_dataset(path: str | Path) -> Dataset:
    """Open the folder that `megatrain-data tokenize` wrote.

    Raises DataError where it is missing, unfinished, damaged, or something else.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    return Dataset(folder, manifest, read_shard_table(folder, manifest))


def read_shard_table(folder: Path, manifest: Manifest) -> pa.Table:
    """The checked table of shards: documents, tokens, text_bytes, bytes and checksum of each."""
    path = folder / SHARD_TABLE_FILE
    advice = "Copy the dataset again, or tokenize again."
    try:
        buffer = pa.memory_map(str(path)).read_buffer()
        if checksum(buffer).hex() != manifest.shard_table_checksum:
            raise DataError(f"{path} is damaged: its checksum is not the one in the manifest. {advice}")
        table = pa.ipc.open_file(buffer).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}. {advice}") from None
    if table.schema != SHARD_TABLE_SCHEMA or table.num_rows != manifest.num_shards:
        raise DataError(f"{path} is not the table of the manifest's {manifest.num_shards} shards. {advice}")
    totals = {"documents": manifest.num_documents, "tokens": manifest.num_tokens, "text_bytes": manifest.text_bytes}
    for name, total in totals.items():
        column = table[name].to_numpy()
        if np.any(column < 0) or int(column.sum()) != total:
            raise DataError(f"{path}: the {name} of the shards do not add up to the manifest's {total}. {advice}")
    return table


@dataclass(frozen=True)
class DocumentInfo:
    """What is stored of a document beside its tokens."""

    id: str
    hash: bytes
    source_file: str
    source_row: int
    text_bytes: int


@dataclass(frozen=True)
class Shard:
    """A mapped shard: its record batches, and NumPy views of them."""

    batches: list[pa.RecordBatch]
    values: list[Tokens]
    """The tokens of each batch, end to end."""
    offsets: list[npt.NDArray[np.int64]]
    """Where in `values` each document of the batch begins; one entry more than documents, the first is 0."""
    token_starts: list[int]
    """Where in the shard each batch's tokens begin; one entry more than batches."""
    document_starts: list[int]

    @staticmethod
    def read(
        path: Path, buffer: pa.Buffer, dtype: np.dtype[Any], num_documents: int, num_tokens: int, num_bytes: int
    ) -> Shard:
        """Take the views of a mapped shard file; raise DataError if its structure is not what the dataset promises."""
        advice = "Copy the shard again, or tokenize again; `megatrain-data verify` checks the whole dataset."
        try:
            if buffer.size != num_bytes:
                raise DataError(f"{path} has {buffer.size} bytes where the dataset says {num_bytes}. {advice}")
            reader = pa.ipc.open_file(buffer)
            if not reader.schema.equals(document_schema(dtype)):
                raise DataError(f"{path} has not the columns of a shard with {dtype} tokens. {advice}")
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}. {advice}") from None
        shard = Shard.from_batches(batches)
        if (shard.document_starts[-1], shard.token_starts[-1]) != (num_documents, num_tokens):
            raise DataError(f"{path} does not hold the {num_documents} documents and {num_tokens} tokens it should.")
        return shard

    @staticmethod
    def from_batches(batches: list[pa.RecordBatch]) -> Shard:
        """Take the views of record batches that are in memory or mapped."""
        values, offsets, token_starts, document_starts = [], [], [0], [0]
        for batch in batches:
            tokens = batch.column(0)
            bounds = tokens.offsets.to_numpy()
            values.append(tokens.values.to_numpy()[bounds[0] : bounds[-1]])
            offsets.append(bounds - bounds[0] if bounds[0] else bounds)
            token_starts.append(token_starts[-1] + len(values[-1]))
            document_starts.append(document_starts[-1] + batch.num_rows)
        return Shard(batches, values, offsets, token_starts, document_starts)


class Dataset:
    """The documents of a dataset, laid end to end. Made by `open_dataset`.

    Positions and lengths count tokens. Arrays are read-only views of the memory map wherever that is possible.
    """

    def __init__(self, path: Path, manifest: Manifest, shard_table: pa.Table) -> None:
        self.path = path
        self.manifest = manifest
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype)
        self._columns = {name: shard_table[name].to_numpy() for name in ("documents", "tokens", "bytes")}
        self._token_starts: list[int] = [0, *np.cumsum(self._columns["tokens"]).tolist()]
        self._document_starts: list[int] = [0, *np.cumsum(self._columns["documents"]).tolist()]
        self._mapped: dict[int, Shard] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_dataset, (self.path,)

    @property
    def num_documents(self) -> int:
        """Documents, the empty ones not counted: they were left out."""
        return self.manifest.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, each one's end-of-document token included."""
        return self.manifest.num_tokens

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self.manifest.text_bytes

    @property
    def digest(self) -> str:
        """Names the content: tokens, document borders, tokenizer and options."""
        return self.manifest.digest

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""
        return self.manifest.eod_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        return self.manifest.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that made the tokens."""
        return self.path / TOKENIZER_FILE

    @property
    def num_shards(self) -> int:
        """Number of shard files."""
        return self.manifest.num_shards

    def shard_rows(self) -> list[dict[str, int]]:
        """For each shard its documents, tokens and bytes on disk."""
        columns = [column.tolist() for column in self._columns.values()]
        return [dict(zip(self._columns, row, strict=True)) for row in zip(*columns, strict=True)]

    def shard(self, index: int) -> Shard:
        """Shard number `index`, mapped. At most MAX_MAPPED_SHARDS stay mapped, the oldest goes first."""
        shard = self._mapped.get(index)
        if shard is None:
            path = self.path / shard_name(index)
            try:
                buffer = pa.memory_map(str(path)).read_buffer()
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}. Copy it again, or tokenize again.") from None
            shard = Shard.read(path, buffer, self.dtype, *(int(column[index]) for column in self._columns.values()))
            # Two threads may both map it, which is harmless; single dict operations need no lock.
            self._mapped[index] = shard
            for oldest in list(self._mapped)[:-MAX_MAPPED_SHARDS]:
                self._mapped.pop(oldest, None)
        return shard

    def document(self, k: int) -> Tokens:
        """The tokens of document k, its end-of-document token included. IndexError where there is no document k."""
        shard, batch, row = self._find_document(k)
        offsets = shard.offsets[batch]
        return shard.values[batch][offsets[row] : offsets[row + 1]]

    def document_info(self, k: int) -> DocumentInfo:
        """Id, hash, origin and text bytes of document k."""
        shard, batch, row = self._find_document(k)
        columns: dict[str, Any] = shard.batches[batch].slice(row, 1).drop_columns(["tokens"]).to_pylist()[0]
        source = columns.pop("source")
        return DocumentInfo(source_file=source["file"], source_row=source["row"], **columns)

    def document_range(self, k: int) -> tuple[int, int]:
        """First position of document k, and the first one behind it."""
        shard, batch, row = self._find_document(k)
        base = self._token_starts[bisect_right(self._document_starts, k) - 1] + shard.token_starts[batch]
        offsets = shard.offsets[batch]
        return base + int(offsets[row]), base + int(offsets[row + 1])

    def document_at(self, position: int) -> int:
        """Number of the document that the token at `position` belongs to."""
        self._check_span(position, 1)
        index = bisect_right(self._token_starts, position) - 1
        shard, local = self.shard(index), position - self._token_starts[index]
        batch = bisect_right(shard.token_starts, local) - 1
        row = int(shard.offsets[batch].searchsorted(local - shard.token_starts[batch], side="right")) - 1
        return self._document_starts[index] + shard.document_starts[batch] + row

    def window(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length) of the documents laid end to end. IndexError where they do not exist."""
        self._check_span(start, length)
        pieces = []
        while True:
            index = bisect_right(self._token_starts, start, hi=self.num_shards) - 1
            shard, local = self.shard(index), start - self._token_starts[index]
            batch = bisect_right(shard.token_starts, local, hi=len(shard.values)) - 1
            local -= shard.token_starts[batch]
            piece = shard.values[batch][local : local + length]
            if len(piece) == length:
                break
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return np.concatenate([*pieces, piece]) if pieces else piece

    def document_starts(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Where in the window [start, start + length) documents begin: offsets from `start`, ascending.

        0 is among them only if a document begins exactly at `start`.
        """
        self._check_span(start, length)
        found = [np.empty(0, np.int64)]
        stop = start + length
        index = max(bisect_right(self._token_starts, start) - 1, 0)
        while index < self.num_shards and self._token_starts[index] < stop:
            shard, base = self.shard(index), self._token_starts[index]
            batch = max(bisect_right(shard.token_starts, start - base) - 1, 0)
            while batch < len(shard.values) and base + shard.token_starts[batch] < stop:
                first = base + shard.token_starts[batch]
                begins = shard.offsets[batch][:-1]
                low, high = begins.searchsorted([start - first, stop - first])
                found.append(begins[low:high] + (first - start))
                batch += 1
            index += 1
        return np.concatenate(found)

    def window_bytes(self, start: int, length: int) -> int:
        """UTF-8 bytes of the text behind the tokens [start, start + length): see `token_bytes`."""
        return int(self.token_bytes[self.window(start, length)].sum())

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of text that each token id stands for (vocab_size entries); special tokens stand for none.

        Exact for every byte-level tokenizer without a normaliser: the bytes of a document's tokens add up to its
        `text_bytes`. A normaliser changes the text before it is cut, and this counts what it made of it.
        """
        return token_lengths(self.tokenizer_path, self.vocab_size)

    def _find_document(self, k: int) -> tuple[Shard, int, int]:
        """The shard of document k, the record batch in it, and the row in that."""
        if not 0 <= k < self.num_documents:
            raise IndexError(f"There is no document {k} in {self.path}: it has {self.num_documents}, counted from 0.")
        index = bisect_right(self._document_starts, k) - 1
        shard, row = self.shard(index), k - self._document_starts[index]
        batch = bisect_right(shard.document_starts, row) - 1
        return shard, batch, row - shard.document_starts[batch]

    def _check_span(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"Tokens [{start}, {start + length}) are not in {self.path}: it has {self.num_tokens} tokens."
            )


def token_lengths(tokenizer_path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of text behind each token id of a tokenizer.json.

    A byte-level vocabulary spells every byte as one character. Any other is taken to spell text as it is, with
    SentencePiece's two signs: U+2581 for a space, and `<0xNN>` for a byte.
    """
    try:
        tokenizer = orjson.loads(tokenizer_path.read_bytes())
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list their pieces with scores.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((p[0], i) for i, p in enumerate(vocabulary))
        byte_level = '"ByteLevel"' in orjson.dumps([tokenizer["decoder"], tokenizer["pre_tokenizer"]]).decode()
        lengths = np.zeros(vocab_size, np.int64)
        for token, token_id in pairs:
            lengths[token_id] = len(token) if byte_level else _spelled_bytes(token)
        for added in tokenizer["added_tokens"]:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{tokenizer_path} is no readable tokenizer ({error!r}). Copy the dataset again.") from None
    return lengths


def _spelled_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())

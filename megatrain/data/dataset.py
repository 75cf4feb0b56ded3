"""Reading a tokenised dataset: memory-mapped, opened in milliseconds whatever its size.

Opening reads the manifest and maps the table of shards. A shard is mapped when it is first needed, and the NumPy views
of a record batch are taken when that is first needed: a window is then two bisections and a slice, and a slice alone
where a window near it was read before. So many shards stay mapped and no more; a view that outlives its shard keeps its
map alive. Nothing is locked, and what threads may do twice does no harm, so a dataset may be used from many threads,
and after a fork.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.data.chat import CHAT_DATE
from megatrain.data.format import (
    LABELED_PAIRS,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    Manifest,
    as_numpy,
    document_schema,
)
from megatrain.data.remote import Cache, RemoteFolder
from megatrain.data.shard import ScoredRuns, Shard, Tokens
from megatrain.data.shard_table import Ints
from megatrain.data.sharded import ShardedDataset, open_storage
from megatrain.data.storage import MAPPED_SHARDS, LocalFolder
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import DataError

NEAR_BITS = 17
"""Positions that differ only in so many low bits are near each other. A record batch has some 2^20 tokens."""
MAX_NEAR = 1 << 15
"""Some 8 MB, for 4 billion tokens; more are found by bisection."""
NOTHING = 1, 0, np.empty(0, np.uint8)
"""Holds no window."""


def open_dataset(path: str | Path, cache: Cache | None = None, max_mapped_shards: int = MAPPED_SHARDS) -> Dataset:
    """Open the folder that `megatrain-data tokenize` wrote, or a copy of it at an address that fsspec knows.

    An address is read through ``cache`` (None: the default one), and of it only the manifest is fetched here.
    ``max_mapped_shards``: all datasets of a process together may map some 65,000 regions.
    Raises DataError where it is missing, unfinished, damaged, or something else.
    """
    dataset = Dataset(open_storage(path, cache, max_mapped_shards))
    if isinstance(dataset.storage, LocalFolder):
        dataset.table  # noqa: B018 (mapped and checked now: it is there at once, what is wrong with it is told early)
    return dataset


def require_same_tokenizer(datasets: Sequence[Dataset]) -> None:
    """Raise DataError where datasets for one model are of several tokenizers, or end or begin documents otherwise."""
    for other in datasets[1:]:
        first = datasets[0]
        one, two = first.manifest, other.manifest
        if one.tokenizer_sha256 != two.tokenizer_sha256:
            raise DataError(
                f"{other.path} was tokenized with another tokenizer than {first.path}: a model knows one vocabulary. "
                "Tokenize both with the same tokenizer.json."
            )
        if one.target_tokenizer_sha256 != two.target_tokenizer_sha256:
            raise DataError(
                f"The targets of {other.path} were tokenized with another tokenizer than those of {first.path}: a "
                "model writes one vocabulary. Tokenize both with the same --target-tokenizer, or both without."
            )
        if (one.eod_id, one.bos_id) != (two.eod_id, two.bos_id):
            raise DataError(
                f"{other.path} {document_markers(two)}, and {first.path} {document_markers(one)}: a model learns one "
                "kind of document. Tokenize both with the same --eod-token and --bos-token."
            )


def document_markers(manifest: Manifest) -> str:
    """The tokens that end and begin a dataset's documents, in words."""
    begin = f" and begins them with {manifest.bos_token} (id {manifest.bos_id})" if manifest.bos_token else ""
    return f"ends its documents with {manifest.eod_token} (id {manifest.eod_id}){begin}"


class Dataset(ShardedDataset):
    """The documents of a dataset, laid end to end. Made by `open_dataset`.

    Positions and lengths count tokens. Arrays are read-only views of the memory map wherever that is possible.
    """

    manifest: Manifest

    def __init__(self, storage: LocalFolder | RemoteFolder) -> None:
        manifest = Manifest.parse(*storage.manifest())
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype)
        super().__init__(storage, manifest, document_schema(self.dtype, supervision=manifest.supervision))
        self._near: dict[int, tuple[int, int, Tokens]] = {}
        """By position >> NEAR_BITS, the record batch that was read there last: its first position, the one behind its
        last, and its tokens; MAX_NEAR of them. Emptied when a shard is opened, as another one may be let go."""

    def shard_opens(self) -> None:
        self._near.clear()

    @property
    def contents(self) -> str:
        """In words."""
        return f"{self.num_documents} documents, {self.num_tokens} tokens"

    @property
    def amount(self) -> str:
        """How large it is, in words."""
        return f"{self.num_tokens:,} tokens"

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def text_bytes(self) -> int:
        return self.manifest.text_bytes

    @property
    def has_scored(self) -> bool:
        """Whether some tokens do not count as targets: prompts, and what a chat template writes around answers."""
        return self.manifest.num_scored is not None

    @property
    def holds_pairs(self) -> bool:
        """Whether each document is a source and its target, made for an encoder-decoder model."""
        return self.manifest.options.get("examples") == "source_target"

    @property
    def eod_id(self) -> int:
        return self.manifest.eod_id

    @property
    def bos_id(self) -> int | None:
        """The token that begins every document, where the dataset was made with one."""
        return self.manifest.bos_id

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer can give."""
        return self.manifest.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that made the tokens, on this machine."""
        return self.storage.file(TOKENIZER_FILE, self.manifest.tokenizer_sha256)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises DataError where its file is missing or damaged."""
        advice = "Copy it again from where the dataset was made; `megatrain-data verify` checks the whole dataset."
        return Tokenizer.open(self.tokenizer_path, DataError, advice)

    @property
    def target_tokenizer_path(self) -> Path | None:
        """The tokenizer.json that made the targets of pairs; None where it is that of the sources."""
        sha256 = self.manifest.target_tokenizer_sha256
        return None if sha256 is None else self.storage.file(TARGET_TOKENIZER_FILE, sha256)

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        """The one that made the targets of pairs. Raises DataError as ``tokenizer`` does."""
        path = self.target_tokenizer_path
        return self.tokenizer if path is None else Tokenizer.open(path, DataError, "Copy it again.")

    @property
    def target_eod_id(self) -> int:
        """What ends the targets of pairs."""
        own = self.manifest.target_eod_id
        return self.eod_id if own is None else own

    @property
    def target_vocab_size(self) -> int:
        """One more than the largest id of a target."""
        return self.manifest.target_vocab_size or self.vocab_size

    @property
    def num_ids(self) -> int:
        """One more than the largest id of a token, of a source or a target."""
        return max(self.vocab_size, self.target_vocab_size)

    def texts_of_id(self, token: int) -> str:
        """What an id stands for; of pairs with two tokenizers, in a source and in a target."""
        both = {self.tokenizer.name: self.tokenizer, self.target_tokenizer.name: self.target_tokenizer}
        return " | ".join(each.decode([token]) for each in both.values())

    def text_of(self, document: Tokens) -> str:
        """The text of a whole document, without what begins and ends it."""
        ids = document[0 if self.bos_id is None else 1 : -1].tolist()
        if self.manifest.target_tokenizer_sha256 is None:
            return self.tokenizer.decode(ids)
        end = ids.index(self.eod_id) + 1  # of the source, which has no other
        return self.tokenizer.decode(ids[:end]) + self.target_tokenizer.decode(ids[end:])

    def template_files(self) -> dict[str, bytes]:
        """The chat template that wrote the conversations, and what else came with its tokenizer, by file name."""
        named = (self.manifest.template_files or {}).items()
        return {name: self.storage.content(name, checksum).to_pybytes() for name, checksum in named}

    @property
    def label_names(self) -> list[str] | None:
        """Of the labels that its documents have, by number; None where they have none."""
        return self.manifest.label_names

    @property
    def has_text_pairs(self) -> bool:
        """Whether its documents are two texts with one label, each with its end."""
        return self.manifest.options.get("examples") == LABELED_PAIRS

    @property
    def chat_template(self) -> str | None:
        """The SHA-256 of the chat template that wrote the conversations; None where none did."""
        return self.manifest.options.get("chat_template")

    @property
    def chat_date(self) -> date | None:
        """The day that the chat template was told, where it asked for one."""
        day = self.manifest.options.get(CHAT_DATE)
        return None if day is None else date.fromisoformat(day)

    def document(self, k: int) -> Tokens:
        """The tokens of document k, its end-of-document token included. IndexError where there is no document k."""
        shard, batch, row = self._find_document(k)
        tokens, offsets = shard.views(batch)
        return tokens[offsets[row] : offsets[row + 1]]

    def document_range(self, k: int) -> tuple[int, int]:
        """First position of document k, and the first one behind it."""
        shard, batch, row = self._find_document(k)
        base = self.table.token_starts[bisect_right(self.table.document_starts, k) - 1] + shard.token_starts[batch]
        offsets = shard.views(batch).offsets
        return base + int(offsets[row]), base + int(offsets[row + 1])

    def document_at(self, position: int) -> int:
        """Number of the document that the token at `position` belongs to."""
        self._check_span(position, 1)
        index = self.table.shard_at(position)
        shard, local = self.shard(index), position - self.table.token_starts[index]
        batch = shard.batch_at(local)
        row = int(shard.views(batch).offsets.searchsorted(local - shard.token_starts[batch], side="right")) - 1
        return self.table.document_starts[index] + shard.document_starts[batch] + row

    def document_lengths(self) -> Iterator[Ints]:
        """Tokens of each document, a record batch at a time."""
        for index in range(self.num_shards):
            shard = self.shard(index)
            for number in range(len(shard.batches)):
                yield np.diff(shard.views(number).offsets)

    def label_at(self, position: int) -> int:
        """Number of the label of the document that begins at ``position``."""
        index = self.table.shard_at(position)
        shard, local = self.shard(index), position - self.table.token_starts[index]
        batch = shard.batch_at(local)
        row = int(shard.views(batch).offsets.searchsorted(local - shard.token_starts[batch]))
        return self._label_numbers[shard.labels(batch)[row].as_py()]

    @cached_property
    def _label_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.label_names or [])}

    def window(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length) of the documents laid end to end. IndexError where they do not exist."""
        stop = start + length
        first, end, tokens = self._near.get(start >> NEAR_BITS, NOTHING)
        if first <= start <= stop <= end:
            return tokens[start - first : stop - first]
        self._check_span(start, length)
        parts = []
        while True:
            index = self.table.shard_at(start)
            shard, base = self.shard(index), self.table.token_starts[index]
            batch = shard.batch_at(start - base)
            first, tokens = base + shard.token_starts[batch], shard.views(batch).tokens
            if self.storage.num_open_batches is None:
                if len(self._near) >= MAX_NEAR:
                    self._near.clear()
                self._near[start >> NEAR_BITS] = first, first + len(tokens), tokens
            parts.append(tokens[start - first : stop - first])
            start += len(parts[-1])
            if start == stop:
                return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def document_starts(self, start: int, length: int) -> Ints:
        """Where in the window [start, start + length) documents begin: offsets from `start`, ascending.

        0 is among them only if a document begins exactly at `start`.
        """
        self._check_span(start, length)
        found = [np.empty(0, np.int64)]
        for shard, batch, first in self._batches(start, start + length):
            begins = shard.views(batch).offsets[:-1]
            low, high = begins.searchsorted([start - first, start + length - first])
            found.append(begins[low:high] + (first - start))
        return np.concatenate(found)

    def scored(self, start: int, length: int) -> npt.NDArray[np.bool_]:
        """Whether each token of [start, start + length) counts as a target."""
        self._check_span(start, length)
        if not self.has_scored:
            return np.ones(length, np.bool_)
        parts = self._parts(start, start + length)
        masks = [shard.scored(batch).mask(low, high) for shard, batch, low, high in parts]
        return np.concatenate([np.empty(0, np.bool_), *masks])

    def scored_runs(self) -> Iterator[ScoredRuns]:
        """Which tokens count as targets, a record batch at a time, of a dataset that says it."""
        for index in range(self.num_shards):
            shard = self.shard(index)
            yield from map(shard.scored, range(len(shard.batches)))

    def num_scored(self, start: int, length: int) -> int:
        """How many tokens of [start, start + length) count as targets."""
        self._check_span(start, length)
        if not self.has_scored:
            return length
        parts = self._parts(start, start + length)
        return sum(shard.scored(batch).num_scored(low, high) for shard, batch, low, high in parts)

    def window_bytes(self, start: int, length: int) -> int:
        """UTF-8 bytes of the text behind the tokens [start, start + length).

        Of whole documents it is what was stored. Of a part of a document it is that document's bytes, shared out by
        ``token_bytes``: exact for byte-level tokenizers without a normaliser, and nearly so for others.
        """
        self._check_span(start, length)
        total = 0
        if length == 0:
            return total
        for shard, batch, low, high in self._parts(start, start + length):
            tokens, offsets = shard.views(batch)
            text_bytes = as_numpy(shard.record_batch(batch).column("text_bytes"))
            row, last = offsets.searchsorted([low, high - 1], side="right") - 1
            total += int(text_bytes[row : last + 1].sum())
            # What lies outside, of the first document and of the last.
            total -= self._bytes_before(tokens[offsets[row] : offsets[row + 1]], low - offsets[row], text_bytes[row])
            document = tokens[offsets[last] : offsets[last + 1]]
            total -= int(text_bytes[last]) - self._bytes_before(document, high - offsets[last], text_bytes[last])
        return total

    def scored_bytes(self, start: int, length: int) -> int:
        """UTF-8 bytes of the text behind those of the tokens [start, start + length) that count as targets, by
        ``token_bytes``."""
        return int(self._target_token_bytes[self.window(start, length)[self.scored(start, length)]].sum())

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of text that each token id stands for (vocab_size entries); special tokens stand for none.

        Exact for every byte-level tokenizer without a normaliser: the bytes of a document's tokens add up to its
        `text_bytes`. A normaliser changes the text before it is cut, and this counts what it made of it.
        """
        lengths = self.tokenizer.token_lengths(self.vocab_size)
        lengths[[marker for marker in (self.eod_id, self.bos_id) if marker is not None]] = 0
        return lengths

    @cached_property
    def _target_token_bytes(self) -> npt.NDArray[np.int64]:
        """The same of the targets of pairs."""
        if self.manifest.target_tokenizer_sha256 is None:
            return self.token_bytes
        lengths = self.target_tokenizer.token_lengths(self.target_vocab_size)
        lengths[self.target_eod_id] = 0
        return lengths

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int]]:
        """The record batches that hold tokens of [start, stop): shard, number in it, the batch's first position."""
        table = self.table
        for index in range(table.shard_at(start), self.num_shards):
            base = table.token_starts[index]
            if base >= stop:
                return
            shard = self.shard(index)
            for number in range(shard.batch_at(max(start - base, 0)), len(shard.batches)):
                if base + shard.token_starts[number] >= stop:
                    return
                yield shard, number, base + shard.token_starts[number]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """The tokens [start, stop) by record batch: shard, number in it, and which of the batch: [low, high)."""
        for shard, batch, first in self._batches(start, stop):
            yield shard, batch, max(start - first, 0), min(stop - first, shard.batches[batch].num_tokens)

    def _bytes_before(self, document: Tokens, count: int, text_bytes: int) -> int:
        """Bytes of text behind the first ``count`` tokens of a document whose text has ``text_bytes``."""
        if count in (0, len(document)):
            return int(text_bytes) if count else 0
        behind = self.token_bytes[document]
        return int(text_bytes) * int(behind[:count].sum()) // max(int(behind.sum()), 1)

    def _check_span(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"Tokens [{start}, {start + length}) are not in {self.path}: it has {self.num_tokens} tokens."
            )

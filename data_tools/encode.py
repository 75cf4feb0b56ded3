"""One unit of the input: read, encoded, and committed part by part.

While one batch of documents is being encoded, which needs no interpreter, the next is read and parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data_tools.engines import Engine
from data_tools.executors import Advance
from data_tools.job import committed_names
from data_tools.readers import read_commits
from data_tools.tokenizer import TokenizerFile
from data_tools.units import Part, ReadOptions, Record, Unit
from data_tools.work import PartStore, write_batches
from megatrain.data.format import Unknown, canonical_json, token_dtype
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText

T = TypeVar("T")
U = TypeVar("U")

ENCODE_CHARACTERS = 1 << 20
"""About how much text the encoder is given at once."""


def part_schema(dtype: np.dtype[Any], metadata: dict[str, Any]) -> pa.Schema:
    """Columns of a part: those of a shard, but for what only the whole input tells.

    `file` is the index in the unit's files, `row` is counted from the start of the part.
    """
    columns = {
        "tokens": pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)),
        "id": pa.string(),
        "hash": pa.binary(16),
        "file": pa.uint32(),
        "row": pa.uint64(),
        "text_bytes": pa.uint64(),
    }
    return pa.schema(list(columns.items()), metadata={b"megatrain": canonical_json(metadata)})


class UnitEncoder:
    """Encodes units with the chosen engine."""

    def __init__(self, store: PartStore, tokenizer: TokenizerFile, options: ReadOptions, engine: Engine) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._options = options
        self._engine = engine
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Commit the parts of the unit that are not there, as it goes; record it as finished at the end."""
        numbers = []
        for part in read_commits(unit, self._options, advance):
            numbers.append(part.number)
            path = self._store.part_path(unit, part.number)
            if path.name not in committed_names(path.parent):
                self._commit(unit, part)
        if not unit.is_one_part:
            self._store.finish_unit(unit, numbers)

    def _commit(self, unit: Unit, part: Part) -> None:
        counts: dict[str, Any] = {"num_empty": 0}
        documents = _without_empty(part.batches(ENCODE_CHARACTERS, counts), counts)
        batches, unknown = [], Unknown()
        for batch, unknown_there in _ahead(partial(self._encode, unit), documents):
            batches.append(batch)
            unknown += unknown_there
        counts["unknown"] = asdict(unknown)
        counts["num_documents"] = sum(batch.num_rows for batch in batches)
        counts["num_tokens"] = sum(len(batch["tokens"].values) for batch in batches)
        unit.refuse_changed()
        write_batches(self._store.part_path(unit, part.number), part_schema(self._dtype, counts), batches)

    @cached_property
    def _unknown_text(self) -> UnknownText | None:
        """Counts what has no tokens, with a tokenizer to which that can happen."""
        tokenizer = self._tokenizer
        return None if tokenizer.loses_nothing else UnknownText(Tokenizer(tokenizer.text_json, "the tokenizer"))

    def _encode(self, unit: Unit, documents: list[tuple[int, Record]]) -> tuple[pa.RecordBatch, Unknown]:
        texts = [document.text for _, document in documents]
        ids, offsets = self._engine.encode(texts)
        unknown = Unknown()
        if self._unknown_text is not None:
            names = [document.id or unit.files[document.file].name for _, document in documents]
            unknown = self._unknown_text.count(texts, ids, offsets, names)
        tokens, offsets = self._mark_documents(ids, offsets)
        item_bytes = self._dtype.itemsize
        data = tokens.data.cast("B")
        bounds = (offsets * item_bytes).tolist()
        hashes = [xxhash.xxh3_128_digest(data[a:b]) for a, b in pairwise(bounds)]
        schema = part_schema(self._dtype, {})
        columns = [
            pa.LargeListArray.from_arrays(offsets, pa.array(tokens), type=schema.field("tokens").type),
            pa.array([document.id for _, document in documents], pa.string()),
            pa.array(hashes, pa.binary(16)),
            pa.array([document.file for _, document in documents], pa.uint32()),
            pa.array([row for row, _ in documents], pa.uint64()),
            pa.array([len(text) if text.isascii() else len(text.encode()) for text in texts], pa.uint64()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema), unknown

    def _mark_documents(
        self, ids: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids in the dataset's type, the id that begins a document and the one that ends it added; new offsets."""
        bos_id = self._tokenizer.bos_id
        offsets = offsets + np.arange(len(offsets)) * (1 if bos_id is None else 2)
        tokens = np.empty(offsets[-1], self._dtype)
        is_text = np.ones(len(tokens), bool)
        for positions, marker in ((offsets[:-1], bos_id), (offsets[1:] - 1, self._tokenizer.eod_id)):
            if marker is not None:
                is_text[positions] = False
                tokens[positions] = marker
        tokens[is_text] = ids
        return tokens, offsets


def _without_empty(
    batches: Iterator[list[tuple[int, Record]]], counts: dict[str, Any]
) -> Iterator[list[tuple[int, Record]]]:
    for batch in batches:
        documents = [(row, document) for row, document in batch if document.text]
        counts["num_empty"] += len(batch) - len(documents)
        if documents:
            yield documents


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Like `map`, but the next item is made while the function is at work on one."""
    with ThreadPoolExecutor(1) as thread:
        pending: Future[U] | None = None
        for item in items:
            begun = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = begun
        if pending is not None:
            yield pending.result()

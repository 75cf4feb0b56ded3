"""One unit of the input: read, encoded, and committed part by part.

While one batch of documents is being encoded, which needs no interpreter, the next is read and parsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_tools.dataset_job import pack_parts
from data_tools.engines import Engine
from data_tools.executors import Advance
from data_tools.supervised import Encoded, Example, ExampleEncoder, PairEncoder, Supervision
from data_tools.tokenizer import TokenizerFile
from data_tools.units import MAX_LISTED, Part, ReadOptions, Record, Unit
from data_tools.work import PartStore, write_batches
from megatrain.data.format import SCORED, Unknown, canonical_json, count_scored, document_hash, token_dtype
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText

T = TypeVar("T")
U = TypeVar("U")

Documents = Sequence[tuple[int, Record | Example]]
"""With their rows."""

ENCODE_CHARACTERS = 1 << 20
"""About how much text the encoder is given at once."""


def part_schema(dtype: np.dtype[Any], metadata: dict[str, Any], supervision: pa.Field | None = None) -> pa.Schema:
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
    if supervision is not None:
        columns[supervision.name] = supervision.type
    return pa.schema(list(columns.items()), metadata={b"megatrain": canonical_json(metadata)})


class UnitEncoder:
    """Encodes units with the chosen engine."""

    def __init__(
        self,
        store: PartStore,
        tokenizer: TokenizerFile,
        options: ReadOptions,
        engine: Engine,
        supervision: Supervision | None = None,
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._options = options
        self._engine = engine
        self._supervision = supervision
        max_tokens, target = (
            (None, None) if supervision is None else (supervision.max_tokens, supervision.target_tokenizer)
        )
        self._examples: ExampleEncoder | PairEncoder = ExampleEncoder(tokenizer, max_tokens)
        if target is not None:
            self._examples = PairEncoder(tokenizer, target, max_tokens)
        self._dtype = token_dtype(max(tokenizer.vocab_size, 0 if target is None else target.vocab_size))

    def __call__(self, unit: Unit, advance: Advance) -> None:
        """Commit the parts of the unit that are not there."""
        pack_parts(self._store, unit, self._options, advance, partial(self._commit, unit))

    def _commit(self, unit: Unit, part: Part) -> None:
        counts: dict[str, Any] = {"num_empty": 0}
        batches: list[pa.RecordBatch] = []
        unknown = Unknown()
        rows = part.batches(ENCODE_CHARACTERS, counts)
        if self._supervision is None:
            encoded = _ahead(partial(self._encode, unit), _without_empty(rows, counts))
        else:
            examples = Counter[str]()
            made = make_examples(self._supervision, rows, counts, examples)
            encoded = _ahead(partial(self._encode_examples, unit, examples), made)
        for batch, unknown_there in encoded:
            batches.append(batch)
            unknown += unknown_there
        counts["unknown"] = asdict(unknown)
        counts["num_documents"] = sum(batch.num_rows for batch in batches)
        counts["num_tokens"] = sum(len(batch["tokens"].values) for batch in batches)
        if self._supervision is not None:
            counts["examples"] = examples
            if self._supervision.column is SCORED:
                counts["num_scored"] = sum(map(count_scored, batches))
            else:
                counts["labels"] = Counter(chain.from_iterable(batch["label"].to_pylist() for batch in batches))
        unit.refuse_changed()
        write_batches(self._store.part_path(unit, part.number), self._schema(counts), batches)

    def _schema(self, metadata: dict[str, Any]) -> pa.Schema:
        return part_schema(self._dtype, metadata, self._supervision and self._supervision.column)

    @cached_property
    def _unknown_text(self) -> UnknownText | None:
        """Counts what has no tokens, with a tokenizer to which that can happen."""
        tokenizer = self._tokenizer
        return None if tokenizer.loses_nothing else UnknownText(Tokenizer(tokenizer.text_json, "the tokenizer"))

    def _count_unknown(
        self, unit: Unit, documents: Documents, ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64]
    ) -> Unknown:
        if self._unknown_text is None:
            return Unknown()
        texts = [document.text for _, document in documents]
        return self._unknown_text.count(texts, ids, offsets, _names(unit, documents))

    @staticmethod
    def _count_unknown_of_pairs(
        encoder: PairEncoder, unit: Unit, documents: Sequence[tuple[int, Example]], encoded: Sequence[Encoded]
    ) -> Unknown:
        """Of each side by its own tokenizer."""
        total, names = Unknown(), _names(unit, documents)
        texts, ids = ([encoder.sides(each) for _, each in documents], [encoder.split(each) for each in encoded])
        for number, tokenizer in enumerate((encoder.source, encoder.target)):
            if not tokenizer.loses_nothing and documents:
                of_side = [pair[number] for pair in ids]
                offsets = np.cumsum([0, *map(len, of_side)])
                counter = UnknownText(Tokenizer(tokenizer.text_json, "the tokenizer"))
                total += counter.count([pair[number] for pair in texts], np.concatenate(of_side), offsets, names)
        return total

    def _encode(self, unit: Unit, documents: list[tuple[int, Record]]) -> tuple[pa.RecordBatch, Unknown]:
        ids, offsets = self._engine.encode([document.text for _, document in documents])
        unknown = self._count_unknown(unit, documents, ids, offsets)
        tokens, offsets = self._mark_documents(ids, offsets)
        return self._batch(documents, tokens, offsets), unknown

    def _encode_examples(
        self, unit: Unit, counts: Counter[str], examples: list[tuple[int, Example]]
    ) -> tuple[pa.RecordBatch, Unknown]:
        encoded = self._examples.encode([example for _, example in examples], counts)
        pairs = [(row, document) for row, document in zip(examples, encoded, strict=True) if document is not None]
        documents = [row for row, _ in pairs]
        ids = [document.ids for _, document in pairs]
        offsets = np.cumsum([0, *map(len, ids)])
        tokens = np.concatenate([np.empty(0, np.uint32), *ids])
        kept = [document for _, document in pairs]
        if isinstance(self._examples, PairEncoder):
            unknown = self._count_unknown_of_pairs(self._examples, unit, documents, kept)
        else:
            unknown = self._count_unknown(unit, documents, tokens, offsets)
        return self._batch(documents, tokens.astype(self._dtype), offsets, kept), unknown

    def _batch(
        self,
        documents: Documents,
        tokens: npt.NDArray[Any],
        offsets: npt.NDArray[np.int64],
        encoded: list[Encoded] | None = None,
    ) -> pa.RecordBatch:
        """The documents as rows of a part; ``encoded``: of examples."""
        data = tokens.data.cast("B")
        bounds = (offsets * self._dtype.itemsize).tolist()
        schema = self._schema({})
        beside = None if encoded is None else [each.scored if each.label is None else each.label for each in encoded]
        behind = [None] * len(documents) if beside is None else list(map(_hashed, beside))
        hashes = [document_hash(data[a:b], each) for (a, b), each in zip(pairwise(bounds), behind, strict=True)]
        if encoded is None:
            text_bytes = [len(d.text) if d.text.isascii() else len(d.text.encode()) for _, d in documents]
        else:
            text_bytes = [each.text_bytes for each in encoded]
        columns = [
            pa.LargeListArray.from_arrays(offsets, pa.array(tokens), type=schema.field("tokens").type),
            pa.array([document.id for _, document in documents], pa.string()),
            pa.array(hashes, pa.binary(16)),
            pa.array([document.file for _, document in documents], pa.uint32()),
            pa.array([row for row, _ in documents], pa.uint64()),
            pa.array(text_bytes, pa.uint64()),
            *([] if beside is None else [pa.array(beside, schema.types[-1])]),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

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


def _names(unit: Unit, documents: Documents) -> list[str]:
    return [document.id or unit.files[document.file].name for _, document in documents]


def _hashed(beside: npt.NDArray[np.uint32] | str) -> memoryview | bytes:
    """The bytes of scored runs, or of a label."""
    return beside.encode() if isinstance(beside, str) else beside.data.cast("B")


def _without_empty(
    batches: Iterator[list[tuple[int, Record]]], counts: dict[str, Any]
) -> Iterator[list[tuple[int, Record]]]:
    for batch in batches:
        documents = [(row, document) for row, document in batch if document.text]
        counts["num_empty"] += len(batch) - len(documents)
        if documents:
            yield documents


def make_examples(
    supervision: Supervision,
    batches: Iterator[list[tuple[int, Record]]],
    counts: dict[str, Any],
    examples: Counter[str],
) -> Iterator[list[tuple[int, Example]]]:
    """The examples of records; ``counts`` and ``examples`` get what is left out, with its row and the reason."""
    for batch in batches:
        made = []
        for row, record in batch:
            examples["read"] += 1
            for found in supervision.examples(record, examples):
                if isinstance(found, Example):
                    made.append((row, found))
                    continue
                examples[found.reason] += 1
                counts["num_skipped"] += 1
                counts["skipped"] += [[record.file, row, found.problem]][: MAX_LISTED - len(counts["skipped"])]
        if made:
            yield made


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

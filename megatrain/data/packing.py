"""Documents packed into samples so that few are cut: best-fit packing, planned once, stored, mapped by every rank.

Ding et al., "Fewer Truncations Improve Language Modeling" (2024). A document of n tokens gives n - 1 pairs of a token
and the one after it. A document of more than seq_len tokens is first cut into chunks that fill a sample each, whose
last target is the next chunk's first input, and a rest. Documents and rests then go, longest first, where the least
space that holds them is left. So each pair of each document is scored once an epoch, in one sample, and no other pair
is. A document's last token is an input as well: it has no target, and divides the document from the next. Of datasets
that say which tokens are scored, conversations that are too long are shortened instead (`conversations.shortened`).

Texts that are classified (`WHOLE`) have one target each, and are cut as they are read.

Where a sample's documents are read from both sides (`ALONE`), a piece of a document is not continued in another sample:
each has the tokens that begin and end a document around it, and its targets are all tokens between them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from megatrain.atomic import committed
from megatrain.data.conversations import Documents, Dropped, shortened, whole_pairs
from megatrain.data.dataset import Dataset
from megatrain.data.format import as_numpy, checksum, file_checksum, map_file
from megatrain.data.shard import ScoredRuns
from megatrain.errors import DataError

Ints = NDArray[np.int64]

DROPPED = "dropped"
"""Of a record batch of a plan: the metadata that hold what was dropped."""
BLOCK_DOCUMENTS = 1 << 22
"""About so many documents are packed at a time, which bounds the memory that planning takes (some 160 bytes each)."""

PLAN_VERSION = 1
CHECKSUM_BYTES = 16

PLAN_COLUMNS = [
    pa.field("piece_start", pa.large_list(pa.int64()), nullable=False),
    pa.field("piece_targets", pa.large_list(pa.int32()), nullable=False),
    pa.field("targets", pa.int32(), nullable=False),
]
"""A row a sample. Its chunks, by where in the dataset their tokens begin; the scored targets of each; those of all."""


def best_fit(sizes: Ints, capacity: int) -> Ints:
    """The number of the bin that each item goes to, best fit decreasing; equal items go in their order.

    Each size must be in [1, capacity]. Items of one size, and bins with one space left, are taken together, so that
    after the sort the work is O(capacity log capacity) steps on whole arrays.
    """
    order = np.argsort((capacity - sizes).astype(np.min_scalar_type(capacity)), kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    bins = np.empty(len(sizes), dtype=np.int64)
    with_space = _BinsBySpace()
    num_bins = first = 0
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        items, first = order[first : first + count], first + count
        while len(items):
            space, open_bins = with_space.take_tightest(size) or (capacity, None)
            each = space // size  # a bin stays the tightest until no further item of this size fits
            num_used = -(-len(items) // each)
            if open_bins is None:
                open_bins = np.arange(num_bins, num_bins + num_used)
                num_bins += num_used
            used, unused = open_bins[:num_used], open_bins[num_used:]
            placed, items = items[: each * len(used)], items[each * len(used) :]
            bins[placed] = np.repeat(used, each)[: len(placed)]
            in_last = len(placed) - each * (len(used) - 1)
            with_space.add(space, unused)
            with_space.add(space - each * size, used[:-1])
            with_space.add(space - in_last * size, used[-1:])
    return bins


class _BinsBySpace:
    """The open bins, found by the space that is left in them."""

    def __init__(self) -> None:
        self._spaces: list[int] = []
        self._bins: dict[int, list[Ints]] = {}

    def add(self, space: int, bins: Ints) -> None:
        if space == 0 or not len(bins):
            return
        if space not in self._bins:
            insort(self._spaces, space)
        self._bins.setdefault(space, []).append(bins)

    def take_tightest(self, size: int) -> tuple[int, Ints] | None:
        """All bins with the least space that is at least ``size``, and that space; None where there are none."""
        at = bisect_left(self._spaces, size)
        if at == len(self._spaces):
            return None
        space = self._spaces.pop(at)
        return space, np.concatenate(self._bins.pop(space))


def pack_documents(documents: Documents, seq_len: int) -> pa.RecordBatch:
    """Samples of these documents: a row of PLAN_COLUMNS each.

    Those of which some tokens are not scored must fit into a sample. Samples of one whole chunk come first, in the
    order of the documents; within a sample, chunks are in that order.
    """
    starts, lengths, num_unscored, _ = documents
    # A rest has [1, seq_len] tokens; a single one predicts nothing and is left out.
    return _pack(starts, lengths - 1, num_unscored, seq_len, seq_len, num_beside=1)


def pack_alone(documents: Documents, seq_len: int) -> pa.RecordBatch:
    """The same of documents each of which is read by itself. They begin and end with a token that is no target."""
    starts, lengths, num_unscored, _ = documents
    return _pack(starts + 1, lengths - 2, num_unscored, seq_len - 2, seq_len, num_beside=2)


def _pack(
    starts: Ints, num_targets: Ints, num_unscored: Ints, most_targets: int, seq_len: int, num_beside: int
) -> pa.RecordBatch:
    """Cut documents of so many targets into chunks of ``most_targets`` and a rest, and pack the rests, each of which
    takes ``num_beside`` places more than it has targets."""
    num_whole = num_targets // most_targets
    rest = num_targets - num_whole * most_targets
    within = np.arange(num_whole.sum()) - np.repeat(np.cumsum(num_whole) - num_whole, num_whole)
    whole_starts = np.repeat(starts, num_whole) + within * most_targets
    is_rest = rest > 0
    rest_starts, rest = (starts + num_whole * most_targets)[is_rest], rest[is_rest]
    bins = best_fit(rest + num_beside, seq_len)
    order = np.argsort(bins, kind="stable")
    num_bins = int(bins.max()) + 1 if len(bins) else 0
    chunks = np.concatenate([np.ones_like(whole_starts), np.bincount(bins, minlength=num_bins)])
    offsets = np.concatenate([[0], np.cumsum(chunks)])
    chunk_start = np.concatenate([whole_starts, rest_starts[order]])
    chunk_targets = np.concatenate([np.full_like(whole_starts, most_targets), rest[order]]).astype(np.int32)
    unscored = np.concatenate([np.repeat(num_unscored, num_whole), num_unscored[is_rest][order]])
    scored = (chunk_targets - unscored).astype(np.int32)
    targets = np.add.reduceat(scored, offsets[:-1]) if len(chunks) else scored
    columns = [
        pa.LargeListArray.from_arrays(offsets, chunk_start),
        pa.LargeListArray.from_arrays(offsets, chunk_targets),
        pa.array(targets),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(PLAN_COLUMNS))


def pack_pairs(pairs: Documents, seq_len: int, target_len: int) -> pa.RecordBatch:
    """Samples of whole pairs: what is not scored of each lies in ``seq_len`` tokens, what is in ``target_len``.

    A pair takes of a sample the larger of its two shares; within one, pairs are in the order of the documents.
    """
    starts, lengths, num_unscored, _ = pairs
    capacity, sources = max(seq_len, target_len), num_unscored + 1
    shares = [-(-sources * capacity // seq_len), -(-(lengths - sources) * capacity // target_len)]
    bins = best_fit(np.maximum(*shares), capacity)
    order = np.argsort(bins, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins))]) if len(bins) else np.zeros(1, np.int64)
    scored = (lengths - sources)[order].astype(np.int32)
    columns = [
        pa.LargeListArray.from_arrays(offsets, starts[order]),
        pa.LargeListArray.from_arrays(offsets, (lengths[order] - 1).astype(np.int32)),
        pa.array(np.add.reduceat(scored, offsets[:-1]) if len(scored) else scored),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(PLAN_COLUMNS))


def pack_whole(documents: Documents, seq_len: int) -> pa.RecordBatch:
    """Samples of documents with one target each, of which a sample holds no more than ``seq_len`` tokens. A chunk's
    length stands for its targets: all of the document's tokens."""
    starts, lengths, _, _ = documents
    bins = best_fit(np.minimum(lengths, seq_len), seq_len)
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    columns = [
        pa.LargeListArray.from_arrays(offsets, starts[order]),
        pa.LargeListArray.from_arrays(offsets, lengths[order].astype(np.int32)),
        pa.array(counts.astype(np.int32)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(PLAN_COLUMNS))


@dataclass(frozen=True)
class Packing:
    """A way to cut documents into chunks. ``name``: in the names of plans' files and in their metadata. ``fit``: where
    documents that do not fit end, in datasets that say which tokens are scored."""

    name: str
    pack: Callable[[Documents, int], pa.RecordBatch]
    fit: Callable[[Ints, Ints, ScoredRuns, int], Documents] = shortened


IN_STREAM = Packing("", pack_documents)
"""For next-token prediction: the plans that have always been."""
ALONE = Packing("alone", pack_alone)
"""For models that read a document from both sides."""
WHOLE = Packing("whole", pack_whole)
"""For texts that are classified."""


class Block(NamedTuple):
    """Mapped samples: chunk j of sample k is chunk offsets[k] + j."""

    offsets: Ints
    chunk_start: Ints
    chunk_targets: NDArray[np.int32]
    targets: NDArray[np.int32]


def pairs_of(target_len: int) -> Packing:
    """For pairs, of which a sample has ``target_len`` tokens of target."""
    pack, fit = partial(pack_pairs, target_len=target_len), partial(whole_pairs, target_len=target_len)
    return Packing(f"pairs-{target_len}", pack, fit)


class PackingPlan:
    """Which chunks of documents each sample of a dataset holds. Made by ``open_plan``.

    ``checksum``: of its content, in hexadecimal: what names the plan. ``dropped``: what is in none of its samples.
    """

    def __init__(self, blocks: list[Block], checksum: str, dropped: Dropped, seq_len: int) -> None:
        self.checksum, self.dropped, self.seq_len = checksum, dropped, seq_len
        self._blocks = blocks
        self._firsts = [0, *np.cumsum([len(block.targets) for block in blocks]).tolist()]

    @property
    def num_samples(self) -> int:
        return int(self._firsts[-1])

    def chunks(self, sample: int) -> Iterator[tuple[int, int]]:
        """Each chunk's first position in the dataset and number of targets, in the order they lie in the sample.

        The chunk's tokens are one more than its targets.
        """
        index = bisect_right(self._firsts, sample) - 1
        block, row = self._blocks[index], sample - self._firsts[index]
        rows = slice(block.offsets[row], block.offsets[row + 1])
        return zip(block.chunk_start[rows].tolist(), block.chunk_targets[rows].tolist(), strict=True)

    def num_targets(self, samples: Ints) -> Ints:
        """Of each of the samples."""
        index = np.searchsorted(self._firsts, samples, side="right") - 1
        counts = np.empty(len(samples), dtype=np.int64)
        for number in np.unique(index).tolist():
            rows = samples[index == number] - self._firsts[number]
            counts[index == number] = self._blocks[number].targets[rows]
        return counts


def store_plan(dataset: Dataset, seq_len: int, folder: Path, packing: Packing = IN_STREAM) -> bool:
    """See to it that ``folder`` holds a whole plan of this dataset; whether it had to be made. For one process alone.

    A plan depends on the dataset's content and seq_len only. Raises DataError where it cannot be written.
    """
    path = _plan_path(dataset, seq_len, folder, packing)
    with suppress(DataError):
        open_plan(dataset, seq_len, folder, packing, verify=True)
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with committed(path, single_writer=True) as unfinished:
            schema = _schema(dataset, seq_len, packing)
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for documents in _documents(dataset, seq_len, packing):
                    dropped = {DROPPED: orjson.dumps(documents.dropped._asdict())} if dataset.has_scored else None
                    writer.write_batch(packing.pack(documents, seq_len), custom_metadata=dropped)
            digest = file_checksum(unfinished)
            with unfinished.open("ab") as file:
                file.write(digest)
    except OSError as error:
        raise DataError(
            f"The packing plan {path} cannot be written: {error.strerror or error}. Make room or give write access "
            "there, or set data.packing to concat."
        ) from None
    return True


def count_samples(dataset: Dataset, seq_len: int, packing: Packing = IN_STREAM) -> int:
    """Samples that a plan for the dataset would have."""
    return sum(packing.pack(documents, seq_len).num_rows for documents in _documents(dataset, seq_len, packing))


def make_plan(dataset: Dataset, seq_len: int, packing: Packing = IN_STREAM) -> PackingPlan:
    """A plan in memory, for datasets that are small."""
    found = list(_documents(dataset, seq_len, packing))
    blocks = [_block(packing.pack(documents, seq_len)) for documents in found]
    return PackingPlan(blocks, "", Dropped.total(documents.dropped for documents in found), seq_len)


def open_plan(
    dataset: Dataset, seq_len: int, folder: Path, packing: Packing = IN_STREAM, *, verify: bool = False
) -> PackingPlan:
    """Map the plan that ``store_plan`` left. Raises DataError where there is none or it belongs to something else.

    ``verify``: also where it is not what was written, by the checksum that its last bytes are.
    """
    path = _plan_path(dataset, seq_len, folder, packing)
    try:
        buffer = map_file(path)
        body_bytes = max(buffer.size - CHECKSUM_BYTES, 0)
        body, digest = buffer.slice(0, body_bytes), buffer.slice(body_bytes).to_pybytes()
        if verify and checksum(body) != digest:
            raise DataError(f"The packing plan {path} is damaged. Delete it and start again.")
        reader = pa.ipc.open_file(body)
        if not reader.schema.equals(_schema(dataset, seq_len, packing), check_metadata=True):
            raise DataError(f"{path} is not the packing plan of {dataset.path}. Delete it and start again.")
        found = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
        blocks = [_block(batch) for batch, _ in found]
        dropped = (Dropped(**orjson.loads(metadata[DROPPED])) for _, metadata in found if metadata)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"The packing plan {path} cannot be read: {error}. Delete it and start again.") from None
    return PackingPlan(blocks, digest.hex(), Dropped.total(dropped), seq_len)


def _block(batch: pa.RecordBatch) -> Block:
    chunks, chunk_targets = batch.column("piece_start"), batch.column("piece_targets")
    views = (chunks.offsets, chunks.values, chunk_targets.values, batch.column("targets"))
    return Block(*map(as_numpy, views))


def _documents(dataset: Dataset, seq_len: int, packing: Packing) -> Iterator[Documents]:
    """The documents as far as they go into samples, about BLOCK_DOCUMENTS at a time: whole record batches."""
    held: list[Documents] = []
    for some in _in_batches(dataset, seq_len, packing):
        held.append(some)
        if sum(len(each.starts) for each in held) >= BLOCK_DOCUMENTS:
            yield _joined(held)
            held = []
    yield _joined(held)


def _in_batches(dataset: Dataset, seq_len: int, packing: Packing) -> Iterator[Documents]:
    base = 0
    runs = dataset.scored_runs() if dataset.has_scored else repeat(None)
    for lengths, scored in zip(dataset.document_lengths(), runs, strict=False):
        found = Documents(np.cumsum(lengths) - lengths, lengths, np.zeros_like(lengths))
        if scored is not None:
            found = packing.fit(found.starts, lengths, scored, seq_len)
        yield found._replace(starts=base + found.starts)
        base += int(lengths.sum())


def _joined(parts: list[Documents]) -> Documents:
    nothing = np.empty(0, dtype=np.int64)
    return Documents(
        np.concatenate([nothing, *(each.starts for each in parts)]),
        np.concatenate([nothing, *(each.lengths for each in parts)]),
        np.concatenate([nothing, *(each.num_unscored for each in parts)]),
        Dropped.total(each.dropped for each in parts),
    )


def _schema(dataset: Dataset, seq_len: int, packing: Packing) -> pa.Schema:
    names = {"packing_plan": PLAN_VERSION, "digest": dataset.digest, "seq_len": seq_len}
    names |= {"packing": packing.name} if packing.name else {}
    return pa.schema(PLAN_COLUMNS, metadata={name: str(value) for name, value in names.items()})


def _plan_path(dataset: Dataset, seq_len: int, folder: Path, packing: Packing) -> Path:
    kind = f"-{packing.name}" if packing.name else ""
    return folder / f"{dataset.digest}-{seq_len}{kind}.arrow"

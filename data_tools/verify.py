"""Checking a dataset byte by byte, and saying where it is not what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from data_tools.executors import Advance, Progress
from data_tools.work import run_tasks
from megatrain.data import Dataset
from megatrain.data.format import (
    SKIPPED_FILE,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    content_digest,
    document_hash,
    is_content,
    shard_name,
)
from megatrain.data.image_format import image_digest, label_bytes
from megatrain.data.images import AnyDataset, ImageDataset, open_either
from megatrain.data.shard import Tokens, Views
from megatrain.data.shard_table import BatchMetadata
from megatrain.errors import DataError

MAX_REPORTED = 10
ADVICE = ". Copy "
"""Begins what an error of the reader advises, which is said once for all here."""
BYTES_PER_WORKER = 64 << 20
"""Less is checked sooner than a process is started."""


def verify_dataset(
    path: str, progress: Progress, *, sample: int | None = None, seed: int = 0, num_workers: int = 1
) -> tuple[AnyDataset, int]:
    """Check a dataset, or a sample of its record batches, with its manifest, table and tokenizer; bytes looked at.

    Checked are checksums, structure, each document's hash, and, if all is read, the digest computed anew. Raises
    DataError that names each damaged file; in a shard also record batch, document and range of bytes.
    """
    dataset = open_either(path)
    dataset.table  # noqa: B018 (what is wrong with it is told first)
    chosen = _chosen_batches(dataset, sample, seed)
    problems = [problem for name, checksum in _files(dataset) for problem in _check_whole_file(dataset, name, checksum)]
    num_bytes = _num_bytes(dataset, chosen)
    num_workers = min(num_workers, 1 + num_bytes // BYTES_PER_WORKER)
    with progress("verify", num_bytes) as advance:
        shards = range(dataset.num_shards) if chosen is None else chosen
        found = run_tasks(partial(check, dataset, chosen), shards, num_workers, advance)
    problems += [problem for problems_of_shard in found for problem in problems_of_shard]
    if chosen is None and not problems:
        digest = _digest(dataset)
        if digest != dataset.digest:
            problems.append(f"{path}: the digest of its documents is {digest}, the manifest says {dataset.digest}")
    if problems:
        more = f" (and {len(problems) - MAX_REPORTED} more)" if len(problems) > MAX_REPORTED else ""
        listed = "; ".join(problems[:MAX_REPORTED])
        raise DataError(f"{path} is damaged: {listed}{more}. Copy these files again, or make the dataset again.")
    return dataset, num_bytes


def _files(dataset: AnyDataset) -> Iterator[tuple[str, str]]:
    """What lies beside the shards: names and checksums."""
    if isinstance(dataset, Dataset):
        yield TOKENIZER_FILE, dataset.manifest.tokenizer_sha256
        if dataset.manifest.target_tokenizer_sha256 is not None:
            yield TARGET_TOKENIZER_FILE, dataset.manifest.target_tokenizer_sha256
        yield from (dataset.manifest.template_files or {}).items()
    if dataset.manifest.skipped_checksum is not None:
        yield SKIPPED_FILE, dataset.manifest.skipped_checksum


def _digest(dataset: AnyDataset) -> str:
    """Computed anew."""
    if isinstance(dataset, ImageDataset):
        return image_digest(dataset.label_names, dataset.hashes())
    known = dataset.manifest
    return content_digest(known.tokenizer_sha256, known.options, known.label_names, dataset.hashes())


def _check_whole_file(dataset: AnyDataset, name: str, checksum: str) -> list[str]:
    try:
        is_whole = is_content(dataset.storage.content(name, checksum), checksum)
    except DataError as error:
        return [_problem(error)]
    return [] if is_whole else [f"{dataset.path}/{name}: its checksum is not the one in the manifest"]


def _chosen_batches(dataset: AnyDataset, sample: int | None, seed: int) -> dict[int, list[int]] | None:
    """The record batches of each shard that are to be checked; None: all bytes of all shards."""
    num_batches = int(dataset.table.batch_starts[-1])
    if sample is None or sample >= num_batches:
        return None
    chosen: dict[int, list[int]] = {}
    drawn = np.random.default_rng(seed).choice(num_batches, sample, replace=False)
    for batch in np.sort(drawn).tolist():
        shard, number = dataset.table.shard_of_batch(batch)
        chosen.setdefault(shard, []).append(number)
    return chosen


def _num_bytes(dataset: AnyDataset, chosen: dict[int, list[int]] | None) -> int:
    if chosen is None:
        return int(dataset.table.rows["bytes"].to_numpy().sum())
    batches = {shard: dataset.table.batches(shard) for shard in chosen}
    return sum(batches[shard][number].num_bytes for shard, numbers in chosen.items() for number in numbers)


def check(dataset: AnyDataset, chosen: dict[int, list[int]] | None, shard: int, advance: Advance) -> list[str]:
    """What is wrong with a shard, or with the chosen record batches of it."""
    problems = []
    try:
        if chosen is None:
            problems += check_shard(dataset, shard)
            advance(dataset.table.num_bytes(shard))
        else:
            batches = dataset.table.batches(shard)
            for number in chosen[shard]:
                data = dataset.storage.read(shard_name(shard), batches[number].offset, batches[number].end)
                problems += check_batch(dataset, shard, batches, number, data)
                advance(data.size)
    except DataError as error:
        problems.append(_problem(error))
    return problems


def check_shard(dataset: AnyDataset, shard: int) -> list[str]:
    """What is wrong with a shard: each of its record batches, what lies before and behind them, and its size."""
    batches, name = dataset.table.batches(shard), shard_name(shard)
    size = dataset.table.num_bytes(shard)
    whole = xxhash.xxh3_128()
    problems = []
    position = 0
    for number, batch in enumerate(batches):
        start, stop = batch.offset, batch.end
        whole.update(memoryview(dataset.storage.read(name, position, start)))
        data = dataset.storage.read(name, start, stop)
        whole.update(memoryview(data))
        problems += check_batch(dataset, shard, batches, number, data)
        position = stop
    end = dataset.storage.read(name, position, size + 1)
    whole.update(memoryview(end))
    found = position + end.size
    if found != size and not problems:
        problems.append(f"{dataset.path}/{name} has not the {size} bytes that were written")
    elif whole.digest() != dataset.table.checksum(shard) and not problems:
        problems.append(
            f"{dataset.path}/{name}: its record batches are whole, but its head (bytes 0 to {batches[0].offset}) or "
            f"its end (bytes {position} to {size}) is not what was written"
        )
    return problems


def check_batch(
    dataset: AnyDataset, shard: int, batches: Sequence[BatchMetadata], number: int, data: pa.Buffer
) -> list[str]:
    """What is wrong with a record batch, given its bytes: the first damaged document, or the whole range of bytes."""
    expected = batches[number]
    where = f"{dataset.path}/{shard_name(shard)}, record batch {number}"
    extent = f"bytes {expected.offset} to {expected.end}"
    is_whole = data.size == expected.num_bytes and is_content(data, expected.checksum.hex())
    try:
        batch = pa.ipc.read_record_batch(data, dataset.schema)
        batch.validate(full=True)
        first_document = sum(before.num_documents for before in batches[:number])
        problem = _batch_problem(batch, dataset, expected, data.address, first_document)
    except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError) as error:
        problem = f"{extent} cannot be read ({_first_line(error)})"
    if problem is None and not is_whole:
        problem = f"{extent} are not what was written, though the {_kind(dataset)[1]} are"
    return [] if problem is None else [f"{where}: {problem}"]


def _kind(dataset: AnyDataset) -> tuple[str, str]:
    """What a row is called, and what it consists of."""
    return ("image", "bytes") if isinstance(dataset, ImageDataset) else ("document", "tokens")


def _batch_problem(
    batch: pa.RecordBatch, dataset: AnyDataset, expected: BatchMetadata, address: int, first_document: int
) -> str | None:
    """The first thing wrong with the content of a record batch whose bytes lie at ``address``."""
    row, parts = _kind(dataset)
    if (batch.num_rows, len(batch.column(0).values)) != (expected.num_documents, expected.num_tokens):
        return f"it does not hold {expected.num_documents} {row}s and {expected.num_tokens} {parts}"
    tokens, offsets = Views.of(batch)
    if np.any(np.diff(offsets) < 1):
        return f"it has a {row} without {parts}"
    data = tokens.data.cast("B")
    bounds = (offsets * tokens.itemsize).tolist()
    hashes = batch["hash"].to_pylist()
    behind = _hashed_behind(batch, dataset)
    for document, ((first, last), written) in enumerate(zip(pairwise(bounds), hashes, strict=True), first_document):
        if document_hash(data[first:last], behind[document - first_document]) != written:
            start = expected.offset + tokens.ctypes.data - address
            hash_start = (
                expected.offset + batch["hash"].buffers()[1].address - address + 16 * (document - first_document)
            )
            return (
                f"{row} {document} of the shard ({parts} in bytes {start + first} to {start + last}) has another "
                f"hash than the one in bytes {hash_start} to {hash_start + 16}"
            )
    if isinstance(dataset, ImageDataset):
        return _label_problem(batch, dataset)
    return _text_problem(batch, dataset, tokens, offsets)


def _label_problem(batch: pa.RecordBatch, dataset: ImageDataset) -> str | None:
    if int(batch["label"].to_numpy().max(initial=0)) >= len(dataset.label_names):
        return f"it holds a label above the {len(dataset.label_names)} that have names"
    return None


def _text_problem(
    batch: pa.RecordBatch, dataset: Dataset, tokens: Tokens, offsets: npt.NDArray[np.int64]
) -> str | None:
    if dataset.label_names is not None and not set(batch["label"].unique().to_pylist()) <= set(dataset.label_names):
        return "it holds a label that the manifest does not name"
    if dataset.has_scored and not _runs_are_good(batch, offsets):
        return "the runs of scored tokens of a document are not ascending, or end behind it"
    markers = [("end-of-document token is not the last", dataset.eod_id, offsets[1:] - 1)]
    if dataset.bos_id is not None:
        markers.append(("token that begins documents is not the first", dataset.bos_id, offsets[:-1]))
    for problem, marker, places in markers:
        # A chat template may write it around each turn too, and each of two texts ends with it.
        is_inside = dataset.has_scored or dataset.has_text_pairs
        found = places[tokens[places] == marker] if is_inside else np.flatnonzero(tokens == marker)
        if not np.array_equal(found, places):
            return f"the {problem} of every document, and only there"
    if int(tokens.max(initial=0)) >= dataset.num_ids:
        return f"it holds a token above the vocabulary of {dataset.num_ids}"
    return None


def _hashed_behind(batch: pa.RecordBatch, dataset: AnyDataset) -> Sequence[memoryview | None]:
    """What goes into the hash of each row behind its content: labels; runs of scored tokens."""
    if isinstance(dataset, ImageDataset):
        return [memoryview(label_bytes(label)) for label in batch["label"].to_pylist()]
    if dataset.label_names is not None:
        return [memoryview(label.encode()) for label in batch["label"].to_pylist()]
    if not dataset.has_scored:
        return [None] * batch.num_rows
    return [None if not runs.is_valid else runs.values.to_numpy().data.cast("B") for runs in batch["scored"]]


def _runs_are_good(batch: pa.RecordBatch, offsets: npt.NDArray[np.int64]) -> bool:
    """Whether each document's runs of scored tokens are ascending, and end in it."""
    for runs, length in zip(batch["scored"], np.diff(offsets).tolist(), strict=True):
        bounds = runs.values.to_numpy().astype(np.int64) if runs.is_valid else np.array([0, length])
        if len(bounds) % 2 or np.any(np.diff(bounds, prepend=-1, append=length + 1) < 1):
            return False
    return True


def _problem(error: DataError) -> str:
    return str(error).partition(ADVICE)[0].rstrip(".")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

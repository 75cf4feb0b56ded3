"""From the parts of all units to the shards of the dataset, in document order.

Shard k holds the documents whose first token is token [k * shard_tokens, (k + 1) * shard_tokens) of all documents laid
end to end. So what is in a shard follows from the documents alone, and any process can write any shard. What goes where
is written down first: then a part can be deleted as soon as the shards that its documents are in are on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_tools.executors import Advance
from data_tools.locks import WorkLocks
from data_tools.tokenizer import TokenizerFile
from data_tools.units import Unit, no_text_error
from data_tools.work import PartFile, PartStore, write_batches
from megatrain.atomic import commit_bytes, committed
from megatrain.data.format import (
    BATCH_TOKENS,
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    SKIPPED_FILE,
    Manifest,
    Unknown,
    content_digest,
    document_schema,
    file_checksum,
    shard_metadata,
    shard_name,
    token_dtype,
)
from megatrain.data.shard_table import shard_row, write_shard_table


@dataclass(frozen=True)
class Recipe:
    """What, beside the documents, goes into a dataset's files."""

    tokenizer: TokenizerFile
    options: dict[str, str]
    shard_tokens: int


@dataclass(frozen=True)
class Slice:
    """Documents [first, last) of a part, and where their rows come from."""

    part: str
    """File name of the part."""
    files: tuple[str, ...]
    first_row: int
    """Row in the file at which the part begins."""
    first: int
    last: int


@dataclass
class ShardPlan:
    """What goes into one shard."""

    index: int
    slices: list[Slice] = field(default_factory=list)
    own_parts: list[str] = field(default_factory=list, repr=False)
    """Parts that no other shard needs: not a neighbour, nor a later one because their file was named twice."""

    @property
    def key(self) -> str:
        """Names the plan: a shard written by another plan is written again."""
        return xxhash.xxh3_128_hexdigest(repr(self).encode())


@dataclass(frozen=True)
class Plan:
    """What goes into all shards, how many empty documents are left out, and what text has no tokens."""

    units: str
    """Names the units that it was made for."""
    shards: list[ShardPlan]
    num_empty: int
    num_skipped: int
    unknown: Unknown

    def __post_init__(self) -> None:
        parts = [{each.part for each in shard.slices} for shard in self.shards]
        num_shards = Counter(part for each in parts for part in each)
        for shard, each in zip(self.shards, parts, strict=True):
            shard.own_parts = sorted(part for part in each if num_shards[part] == 1)


def load_plan(store: PartStore, units: Sequence[Unit]) -> Plan | None:
    """The plan that was written down for these units, if it was. One for other units is removed."""
    try:
        units_key, *planned = orjson.loads(store.plan_path.read_bytes())
    except FileNotFoundError:
        return None
    if units_key != _units_key(units):
        store.plan_path.unlink()
        return None
    num_empty, num_skipped, unknown, shards = planned
    plans = [
        ShardPlan(index, [Slice(part, tuple(files), *rest) for part, files, *rest in slices])
        for index, slices in enumerate(shards)
    ]
    return Plan(units_key, plans, num_empty, num_skipped, Unknown(**unknown))


def make_plan(store: PartStore, units: Sequence[Unit], shard_tokens: int) -> Plan:
    """Plan the shards of units that are all finished, and write the plan down."""
    with committed(store.folder / SKIPPED_FILE) as path, path.open("wb") as skipped:
        plan = plan_shards(units, store, shard_tokens, skipped)
    if not plan.shards:
        raise no_text_error(plan.num_empty, plan.num_skipped)
    slices = [[[s.part, s.files, s.first_row, s.first, s.last] for s in shard.slices] for shard in plan.shards]
    counts = (plan.num_empty, plan.num_skipped, asdict(plan.unknown))
    commit_bytes(store.plan_path, orjson.dumps([plan.units, *counts, slices]))
    return plan


def plan_shards(units: Sequence[Unit], store: PartStore, shard_tokens: int, skipped: IO[bytes]) -> Plan:
    """Which documents go into which shard, and what is left out; `skipped` gets the list of what could not be read."""
    plans: list[ShardPlan] = []
    unknown = Unknown()
    position = num_empty = num_skipped = first_row = 0
    last_shard = -1
    for unit in units:
        if unit.start == 0:
            first_row = 0
        files = tuple(file.name for file in unit.files)
        for part in store.parts(unit):
            for shard, first, last in _shards_of(part, position, shard_tokens):
                if shard != last_shard:
                    plans.append(ShardPlan(len(plans)))
                    last_shard = shard
                plans[-1].slices.append(Slice(part.path.name, files, first_row, first, last))
            skipped.write(unit.skipped_lines(first_row, part.skipped))
            first_row += part.num_rows
            num_empty += part.num_empty
            num_skipped += part.num_skipped
            unknown += Unknown(**part.unknown)
            position += part.num_tokens
    return Plan(_units_key(units), plans, num_empty, num_skipped, unknown)


def _shards_of(part: PartFile, position: int, shard_tokens: int) -> Iterable[tuple[int, int, int]]:
    """Number of each shard that documents of the part go into, and which: [first, last)."""
    shard = position // shard_tokens
    if position + part.num_tokens <= (shard + 1) * shard_tokens:
        return [(shard, 0, part.num_documents)] if part.num_documents else []
    lengths = _lengths(pa.ipc.open_file(pa.memory_map(str(part.path))).read_all())
    return _runs((position + np.cumsum(lengths) - lengths) // shard_tokens)


def finish_dataset(out: Path, work: Path, plan: Plan, recipe: Recipe, job: str) -> Manifest:
    rows = [orjson.loads(_stats_path(work, shard.index).read_bytes())["row"] for shard in plan.shards]
    for stale in set(out.glob("shard-*.arrow")) - {out / shard_name(shard.index) for shard in plan.shards}:
        stale.unlink()
    with committed(out / SHARD_TABLE_FILE, work) as path:
        write_shard_table(path, rows)
    if plan.num_skipped:
        commit_bytes(out / SKIPPED_FILE, (work / SKIPPED_FILE).read_bytes(), work)
    tokenizer = recipe.tokenizer
    manifest = Manifest(
        digest=content_digest(tokenizer.sha256, recipe.options, _document_hashes(out, plan.shards)),
        num_shards=len(plan.shards),
        num_documents=sum(row["documents"] for row in rows),
        num_tokens=sum(row["tokens"] for row in rows),
        text_bytes=sum(row["text_bytes"] for row in rows),
        num_empty_documents=plan.num_empty,
        num_skipped=plan.num_skipped or None,
        skipped_checksum=file_checksum(out / SKIPPED_FILE).hex() if plan.num_skipped else None,
        unknown=plan.unknown,
        dtype=token_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        bos_id=tokenizer.bos_id,
        bos_token=tokenizer.bos_token,
        tokenizer_sha256=tokenizer.sha256,
        options=recipe.options,
        job=job,
        shard_table_checksum=file_checksum(out / SHARD_TABLE_FILE).hex(),
    )
    commit_bytes(out / MANIFEST_FILE, manifest.dump(), work)
    return manifest


class ShardWriter:
    """Writes shards that no process has written or is writing."""

    def __init__(self, out: Path, work: Path, locks: WorkLocks, recipe: Recipe) -> None:
        self._out = out
        self._work = work
        self._locks = locks
        self._recipe = recipe

    def __call__(self, plan: ShardPlan, advance: Advance) -> None:
        """Write the shard, then delete the parts that are in it alone."""
        # Every process comes to every shard in the end; one that is written costs a look.
        if self.is_written(plan):
            return
        with self._locks.try_lock(shard_name(plan.index)) as acquired:
            if acquired and not self.is_written(plan):
                write_shard(self._out, self._work, self._recipe, plan, advance)
                for part in plan.own_parts:
                    (self._work / part).unlink(missing_ok=True)

    def is_written(self, plan: ShardPlan) -> bool:
        """Whether the shard, and what the table of shards is to say of it, are on disk."""
        try:
            stats = orjson.loads(_stats_path(self._work, plan.index).read_bytes())
        except FileNotFoundError:
            return False
        return bool(stats["plan"] == plan.key) and (self._out / shard_name(plan.index)).exists()


def write_shard(out: Path, work: Path, recipe: Recipe, plan: ShardPlan, advance: Advance) -> None:
    path = out / shard_name(plan.index)
    documents, files = _documents(work, plan.slices)
    lengths = _lengths(documents)
    totals = len(lengths), int(lengths.sum()), int(pc.sum(documents["text_bytes"]).as_py())
    tokenizer = recipe.tokenizer
    same_for_all = {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "eod_token": tokenizer.eod_token,
        **({} if tokenizer.bos_id is None else {"bos_id": tokenizer.bos_id, "bos_token": tokenizer.bos_token}),
    }
    metadata = shard_metadata(same_for_all, plan.index, *totals)
    schema = document_schema(token_dtype(tokenizer.vocab_size), metadata)
    runs = _runs((np.cumsum(lengths) - lengths) // BATCH_TOKENS)
    batches = (_shard_batch(documents.slice(first, last - first), files, schema) for _, first, last in runs)
    write_batches(path, schema, batches, work)
    row = shard_row(path, *totals)
    commit_bytes(_stats_path(work, plan.index), orjson.dumps({"plan": plan.key, "row": row}))
    advance(row["bytes"])


def _documents(work: Path, slices: Iterable[Slice]) -> tuple[pa.Table, pa.Array]:
    """The mapped documents of some slices, and their files: `file` is the index in these, `row` counts in the file."""
    tables, files = [], list[str]()
    for part in slices:
        table = pa.ipc.open_file(pa.memory_map(str(work / part.part))).read_all()
        table = table.slice(part.first, part.last - part.first)
        bases = {"file": pa.scalar(len(files), pa.uint32()), "row": pa.scalar(part.first_row, pa.uint64())}
        for name, base in bases.items():
            table = table.set_column(table.schema.get_field_index(name), name, pc.add(table[name], base))
        tables.append(table)
        files += part.files
    return pa.concat_tables(tables), pa.array(files, pa.string())


def _shard_batch(documents: pa.Table, files: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """One record batch of a shard, its buffers new: Arrow pads what it writes of a slice with what lies behind it."""
    tokens, ids, hashes, file, row, text_bytes = (pa.concat_arrays(column.chunks) for column in documents.columns)
    file = files.take(file)
    ids = pc.coalesce(ids, pc.binary_join_element_wise(file, row.cast(pa.string()), ":"))
    source = pa.StructArray.from_arrays([file, row], fields=list(schema.field("source").type))
    return pa.RecordBatch.from_arrays([tokens, ids, hashes, source, text_bytes], schema=schema)


def _document_hashes(out: Path, plans: Sequence[ShardPlan]) -> Iterator[pa.Array]:
    for plan in plans:
        reader = pa.ipc.open_file(pa.memory_map(str(out / shard_name(plan.index))))
        yield from (reader.get_batch(i)["hash"] for i in range(reader.num_record_batches))


def _lengths(documents: pa.Table) -> npt.NDArray[np.int64]:
    """Tokens of each document."""
    lengths: npt.NDArray[np.int64] = pc.list_value_length(documents["tokens"]).to_numpy()
    return lengths


def _runs(values: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Each run of equal values: the value, its first index, and the one behind its last."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, last in pairwise(bounds):
        if last > first:
            yield int(values[first]), first, last


def _units_key(units: Sequence[Unit]) -> str:
    key = xxhash.xxh3_128()
    for unit in units:
        key.update(unit.key.encode())
    return key.hexdigest()


def _stats_path(work: Path, index: int) -> Path:
    return work / f"{shard_name(index)}.json"

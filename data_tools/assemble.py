"""From the parts of all units to the shards of the dataset, in document order.

Shard k holds the documents whose first token is token [k * shard_tokens, (k + 1) * shard_tokens) of all documents laid
end to end. So what is in a shard follows from the documents alone, and any process can write any shard. What goes where
is written down first: then a part can be deleted as soon as the shards that its documents are in are on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.executors import Advance
from data_tools.job import Records, open_committed
from data_tools.memory import Memory
from data_tools.units import Unit
from data_tools.work import PartFile, PartStore, write_batches
from megatrain.atomic import commit_bytes, committed
from megatrain.data.format import (
    BATCH_TOKENS,
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    SKIPPED_FILE,
    Unknown,
    count_scored,
    file_checksum,
    shard_metadata,
    shard_name,
)
from megatrain.data.shard_table import shard_row, write_shard_table
from megatrain.errors import DataError


class Recipe(Protocol):
    """What, beside the rows, goes into a dataset's files. A row is a document of text, or an image."""

    @property
    def shard_tokens(self) -> int:
        """Of text, tokens of a shard; of images, bytes."""

    @property
    def same_for_all_shards(self) -> dict[str, Any]:
        """What the metadata of each shard says."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """What lies beside the shards, by name."""

    def schema(self, metadata: dict[str, Any]) -> pa.Schema:
        """Of a shard: columns of content, id, hash and source, and others."""

    def nothing_error(self, plan: Plan, skipped: bytes) -> DataError:
        """What to say where there is no row; ``skipped``: the rows that were left out."""

    def manifest(self, made: Made, plan: Plan) -> bytes:
        """The manifest of what was made."""


class Made(NamedTuple):
    """What was made of the rows: the shards, the rows of the table of them, and the checksums."""

    shards: list[Path]
    rows: list[dict[str, Any]]
    job: str
    shard_table_checksum: str
    skipped_checksum: str | None

    def total(self, column: str) -> int:
        """Of a column of the table of shards."""
        return sum(row[column] for row in self.rows)


@dataclass(frozen=True)
class Slice:
    """Documents [first, last) of a part, and where their rows come from."""

    part: str
    """File name of the part."""
    files: list[str]
    first_row: int
    """Row in the file at which the part begins."""
    first: int
    last: int


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one shard."""

    slices: list[Slice]
    own_parts: list[str]
    """Parts that no other shard needs: not a neighbour, nor a later one because their file was named twice."""

    @classmethod
    def load(cls, values: dict[str, Any]) -> ShardPlan:
        return cls([Slice(**each) for each in values["slices"]], values["own_parts"])


@dataclass(frozen=True)
class Plan:
    """What is left out of the shards, and what text has no tokens."""

    num_empty: int
    num_skipped: int
    unknown: Unknown
    num_scored: int
    examples: dict[str, int]
    labels: dict[str, int]


@dataclass(frozen=True)
class Assembly:
    """How the shards of a dataset are planned, written and listed, with what that takes in `folder`."""

    out: Path
    folder: Path
    store: PartStore
    recipe: Recipe
    job: str
    memory: Memory

    @property
    def plan_path(self) -> Path:
        """Committed once the plan of shards is; parts may be deleted after that."""
        return self.folder / "plan.json"

    @property
    def shard_plans(self) -> Records:
        return Records(self.folder / "shards.arrow")

    @property
    def plan(self) -> Plan:
        values = orjson.loads(self.plan_path.read_bytes())
        return Plan(**{**values, "unknown": Unknown(**values["unknown"])})

    def make_plan(self, units: Iterable[Unit]) -> None:
        """Plan the shards of units that are all finished, and commit the plan."""
        with committed(self.folder / SKIPPED_FILE) as path, path.open("wb") as skipped:
            plan, shards = plan_shards(units, self.store, self.recipe.shard_tokens, skipped)
        if not shards:
            raise self.recipe.nothing_error(plan, (self.folder / SKIPPED_FILE).read_bytes())
        Records.write(self.folder / "shards.arrow", shards)
        commit_bytes(self.plan_path, orjson.dumps(asdict(plan)))

    def stats_path(self, index: int) -> Path:
        """What the table of shards is to say of a shard that is written."""
        return self.folder / f"shards-{index // 1000:03d}" / f"{shard_name(index)}.json"

    def write_shard(self, index: int, advance: Advance) -> None:
        """Commit the shard and its row in the table of shards; then delete the parts that are in it alone."""
        plan = ShardPlan.load(self.shard_plans[index])
        documents, files = self._documents(plan.slices)
        lengths = _lengths(documents)
        text_bytes = int(pc.sum(documents["text_bytes"]).as_py()) if "text_bytes" in documents.schema.names else 0
        totals = len(lengths), int(lengths.sum()), text_bytes
        schema = self.recipe.schema(shard_metadata(self.recipe.same_for_all_shards, index, *totals))
        runs = runs_of((np.cumsum(lengths) - lengths) // BATCH_TOKENS)

        def batches() -> Iterator[pa.RecordBatch]:
            for _, first, last in runs:
                yield _shard_batch(documents.slice(first, last - first), files, schema)
                self.memory.release_mapped()

        write_batches(self.out / shard_name(index), schema, batches(), self.folder)
        row = shard_row(self.out / shard_name(index), *totals)
        commit_bytes(self.stats_path(index), orjson.dumps(row))
        for part in plan.own_parts:
            self.store.path(part).unlink(missing_ok=True)
        advance(row["bytes"])

    def finish(self) -> None:
        """Commit the table of shards, and the manifest."""
        rows = [orjson.loads(self.stats_path(index).read_bytes()) for index in range(len(self.shard_plans))]
        shards = [self.out / shard_name(index) for index in range(len(rows))]
        for stale in set(self.out.glob("shard-*.arrow")) - set(shards):
            stale.unlink(missing_ok=True)
        with committed(self.out / SHARD_TABLE_FILE, self.folder) as path:
            write_shard_table(path, rows)
        plan, skipped_checksum = self.plan, None
        if plan.num_skipped:
            commit_bytes(self.out / SKIPPED_FILE, (self.folder / SKIPPED_FILE).read_bytes(), self.folder)
            skipped_checksum = file_checksum(self.out / SKIPPED_FILE).hex()
        for name, content in self.recipe.files.items():
            commit_bytes(self.out / name, content, self.folder)
        made = Made(shards, rows, self.job, file_checksum(self.out / SHARD_TABLE_FILE).hex(), skipped_checksum)
        commit_bytes(self.out / MANIFEST_FILE, self.recipe.manifest(made, plan), self.folder)

    def _documents(self, slices: Iterable[Slice]) -> tuple[pa.Table, pa.Array]:
        """The mapped documents of slices, and their files: `file` is the index in these, `row` counts in the file."""
        tables, files = [], list[str]()
        for part in slices:
            table = open_committed(self.store.path(part.part)).read_all()
            table = table.slice(part.first, part.last - part.first)
            bases = {"file": pa.scalar(len(files), pa.uint32()), "row": pa.scalar(part.first_row, pa.uint64())}
            for name, base in bases.items():
                table = table.set_column(table.schema.get_field_index(name), name, pc.add(table[name], base))
            tables.append(table)
            files += part.files
        return pa.concat_tables(tables), pa.array(files, pa.string())


def plan_shards(
    units: Iterable[Unit], store: PartStore, shard_tokens: int, skipped: IO[bytes]
) -> tuple[Plan, list[ShardPlan]]:
    """Which documents go into which shard, and what is left out; `skipped` gets the list of what could not be read."""
    shards: list[list[Slice]] = []
    unknown, examples, labels = Unknown(), Counter[str](), Counter[str]()
    position = num_empty = num_skipped = num_scored = first_row = 0
    last_shard = -1
    for unit, parts in _in_order(units, store):
        if unit.start == 0:
            first_row = 0
        files = [file.name for file in unit.files]
        for part in parts:
            for shard, first, last in _shards_of(part, position, shard_tokens):
                if shard != last_shard:
                    shards.append([])
                    last_shard = shard
                shards[-1].append(Slice(part.path.name, files, first_row, first, last))
            skipped.write(unit.skipped_lines(first_row, part.skipped))
            first_row += part.num_rows
            num_empty += part.num_empty
            num_skipped += part.num_skipped
            num_scored += part.num_scored
            examples.update(part.examples)
            labels.update(part.labels)
            unknown += Unknown(**part.unknown)
            position += part.num_tokens
    parts_of = [{each.part for each in slices} for slices in shards]
    num_shards = Counter(part for parts in parts_of for part in parts)
    own_parts = [sorted(part for part in parts if num_shards[part] == 1) for parts in parts_of]
    reasons = {name: count for name, count in examples.items() if count}
    plan = Plan(num_empty, num_skipped, unknown, num_scored, reasons, dict(labels))
    return plan, list(map(ShardPlan, shards, own_parts))


def _in_order(units: Iterable[Unit], store: PartStore) -> Iterator[tuple[Unit, list[PartFile]]]:
    """The units in document order with their parts; those of one file's readers are put together."""
    parts: list[PartFile] = []
    for unit in units:
        parts += store.parts(unit)
        if unit.reader == unit.num_readers - 1:
            yield unit, sorted(parts)  # by their path, which ends with their number
            parts = []


def _shards_of(part: PartFile, position: int, shard_tokens: int) -> Iterable[tuple[int, int, int]]:
    """Number of each shard that documents of the part go into, and which: [first, last)."""
    shard = position // shard_tokens
    if position + part.num_tokens <= (shard + 1) * shard_tokens:
        return [(shard, 0, part.num_documents)] if part.num_documents else []
    lengths = _lengths(open_committed(part.path).read_all())
    return runs_of((position + np.cumsum(lengths) - lengths) // shard_tokens)


def _shard_batch(documents: pa.Table, files: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """One record batch of a shard, its buffers new: Arrow pads what it writes of a slice with what lies behind it."""
    columns = (pa.concat_arrays(column.chunks) for column in documents.columns)
    content, ids, hashes, file, row, *others = columns
    file = files.take(file)
    ids = pc.coalesce(ids, pc.binary_join_element_wise(file, row.cast(pa.string()), ":"))
    source = pa.StructArray.from_arrays([file, row], fields=list(schema.field("source").type))
    return pa.RecordBatch.from_arrays([content, ids, hashes, source, *others], schema=schema)


def document_hashes(shards: Iterable[Path]) -> Iterator[pa.Array]:
    return (batch["hash"] for batch in _batches(shards))


def num_scored(shards: Iterable[Path]) -> int:
    """Scored tokens of shards that say which these are."""
    return sum(count_scored(batch) for batch in _batches(shards))


def _batches(shards: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    for path in shards:
        reader = open_committed(path)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _lengths(documents: pa.Table) -> npt.NDArray[np.int64]:
    """Tokens of each document, or bytes of each image."""
    lengths: npt.NDArray[np.int64] = pc.list_value_length(documents.column(0)).to_numpy()
    return lengths


def runs_of(values: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Each run of equal values: the value, its first index, and the one behind its last."""
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, last in pairwise(bounds):
        if last > first:
            yield int(values[first]), first, last

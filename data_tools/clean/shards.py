"""The shards of a tokenized dataset, of which `split` makes those of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.assemble import document_hashes, num_scored, runs_of
from data_tools.clean.attributes import Corpus, Reopening, make_folders, map_batches, work_path
from data_tools.executors import Advance
from data_tools.job import Stage
from data_tools.work import write_batches
from megatrain.atomic import commit_bytes, committed
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import (
    BATCH_TOKENS,
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    content_digest,
    document_schema,
    file_checksum,
    shard_metadata,
    shard_name,
)
from megatrain.data.shard_table import shard_row, write_shard_table

if TYPE_CHECKING:
    from data_tools.clean.split import Counting, OneSide

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardSource(Reopening):
    """A dataset whose documents are read."""

    path: Path

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.path)

    @cached_property
    def batches(self) -> Any:
        """The record batches of a shard."""
        return lru_cache(2)(lambda path: map_batches(path))

    def placed(self, corpus: Corpus, part: Any) -> Iterator[tuple[Path, slice, Ints]]:
        """In which shards the documents of a part lie: the shard, which documents, and their rows in it."""
        columns = corpus.columns(part, ["file", "row"])
        rows = columns["row"].to_numpy().astype(np.int64) + int(part["first_row"])
        files = corpus.unit(int(part["unit"])).files
        for index, begin, end in runs_of(columns["file"].to_numpy().astype(np.int64)):
            path = files[index].path
            assert path is not None
            yield path, slice(begin, end), rows[begin:end]

    def sizes(self, corpus: Corpus, part: Any) -> Ints:
        """Bytes of text, and tokens, of the documents of a part: a row for each."""
        found = [self._sizes(path)[rows] for path, _, rows in self.placed(corpus, part)]
        return np.concatenate([np.zeros((0, 2), np.int64), *found])

    @cached_property
    def _sizes(self) -> Any:
        def measured(path: Path) -> Ints:
            batches = ((batch["text_bytes"].to_numpy(), _lengths(batch)) for batch in self.batches(path))
            return np.concatenate([np.stack(columns, axis=1).astype(np.int64) for columns in batches])

        return lru_cache(1)(measured)


@dataclass(frozen=True)
class ShardWriter(Reopening):
    """Writes the dataset of one side: a shard for each task that has documents of it."""

    corpus: Corpus
    source: ShardSource
    folder: Path
    side: OneSide
    counting: Counting
    number: int
    """Of the side, in what was counted."""
    job: str

    @cached_property
    def counts(self) -> npt.NDArray[Any]:
        counts: npt.NDArray[Any] = self.counting.sides[:, self.number]
        return counts

    @property
    def other_files(self) -> dict[str, bytes]:
        """What goes along as it is."""
        dataset = self.source.dataset
        target = dataset.target_tokenizer_path
        of_target = {} if target is None else {TARGET_TOKENIZER_FILE: target.read_bytes()}
        return {TOKENIZER_FILE: dataset.tokenizer_path.read_bytes(), **of_target, **dataset.template_files()}

    def stage(self) -> Stage:
        make_folders(self.folder, len(self.corpus.tasks))
        return Stage(f"write-{self.side.side}", self.corpus.tasks["num_bytes"].tolist(), self.commit, self.write)

    def commit(self, task: int) -> Path:
        return work_path(self.folder, task, f"{task:06d}.json")

    def staged(self, task: int) -> Path:
        return self.commit(task).with_suffix(".arrow")

    def write(self, task: int, advance: Advance) -> None:
        """Commit the shard of a task, and its row in the table of shards."""
        documents, text_bytes, tokens, index = self.counts[task].tolist()
        row = None
        if documents:
            manifest = self.source.dataset.manifest
            keys = ["tokenizer_sha256", "vocab_size", "eod_id", "eod_token", "bos_id", "bos_token"]
            keys += ["target_tokenizer_sha256", "target_vocab_size", "target_eod_id"]
            same_for_all = {key: value for key in keys if (value := getattr(manifest, key)) is not None}
            metadata = shard_metadata(same_for_all, index, documents, tokens, text_bytes)
            dataset = self.source.dataset
            schema = document_schema(dataset.dtype, metadata, manifest.supervision)
            pieces = groupby(self._pieces(task), key=lambda piece: piece[0])
            batches = (_joined([batch for _, batch in group], schema) for _, group in pieces)
            write_batches(self.staged(task), schema, batches)
            row = shard_row(self.staged(task), documents, tokens, text_bytes)
        commit_bytes(self.commit(task), orjson.dumps(row))
        advance(int(self.corpus.tasks[task]["num_bytes"]))

    def _pieces(self, task: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The documents of the side, with the number of the record batch that each belongs to."""
        first, last = self.corpus.tasks[task][["first_part", "last_part"]].tolist()
        position = 0
        parts = (self.corpus.parts[index] for index in range(first, last))
        kept = (
            (path, rows[keeps[some]])
            for part, keeps in ((part, self.side.keeps(part)) for part in parts)
            for path, some, rows in self.source.placed(self.corpus, part)
        )
        for path, rows_of_path in groupby(kept, key=lambda each: each[0]):
            rows = np.concatenate([rows for _, rows in rows_of_path])
            start = 0
            for batch in self.source.batches(path):
                inside = rows[slice(*np.searchsorted(rows, [start, start + batch.num_rows]))] - start
                lengths = _lengths(batch)[inside]
                starts = position + np.cumsum(lengths) - lengths
                for number, begin, end in runs_of(starts // BATCH_TOKENS):
                    yield number, batch.take(pa.array(inside[begin:end]))
                position += int(lengths.sum())
                start += batch.num_rows

    def finish(self) -> None:
        """Commit the table of shards, the tokenizer, and the manifest."""
        dataset, tasks = self.source.dataset, np.flatnonzero(self.counts["documents"]).tolist()
        rows = [orjson.loads(self.commit(task).read_bytes()) for task in tasks]
        with committed(self.folder / SHARD_TABLE_FILE) as path:
            write_shard_table(path, rows)
        for name, content in self.other_files.items():
            commit_bytes(self.folder / name, content)
        hashes = document_hashes(map(self.staged, tasks))
        known = dataset.manifest
        manifest = replace(
            known,
            digest=content_digest(known.tokenizer_sha256, known.options, known.label_names, hashes),
            num_shards=len(rows),
            num_documents=sum(row["documents"] for row in rows),
            num_tokens=sum(row["tokens"] for row in rows),
            text_bytes=sum(row["text_bytes"] for row in rows),
            num_empty_documents=0,
            num_skipped=None,
            skipped_checksum=None,
            unknown=None,
            num_scored=num_scored(map(self.staged, tasks)) if dataset.has_scored else None,
            examples=None,
            job=self.job,
            shard_table_checksum=file_checksum(self.folder / SHARD_TABLE_FILE).hex(),
        )
        commit_bytes(self.folder / MANIFEST_FILE, manifest.dump())

    def moves(self, target: Path) -> Iterator[tuple[Path, Path]]:
        for index, task in enumerate(np.flatnonzero(self.counts["documents"]).tolist()):
            yield target / shard_name(index), self.staged(task)
        for name in (SHARD_TABLE_FILE, *self.other_files, MANIFEST_FILE):
            yield target / name, self.folder / name


def _lengths(batch: pa.RecordBatch) -> Ints:
    """Tokens of each document."""
    lengths: Ints = pc.list_value_length(batch["tokens"]).to_numpy()
    return lengths


def _joined(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """One record batch, its buffers new: Arrow pads what it writes of a slice with what lies behind it."""
    columns = [pa.concat_arrays(columns) for columns in zip(*(batch.columns for batch in batches), strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)

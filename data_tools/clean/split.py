"""`megatrain-data split`: documents held out for validation, by a hash; what is nearly the same stays on one side.

A document's hash is that of the sketch of its text, so it is the same before and after tokenizing; a cluster of near
duplicates has the hash of its first document. Stages: those of `dedup` up to `cluster`, then `count` (what goes to
which side), `number`, `write-train`, `write-validation`, `report`, `publish`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from data_tools.clean.attributes import Corpus, Reopening, make_folders, result_path, save_table, work_path
from data_tools.clean.candidates import Runs
from data_tools.clean.clusters import Clustering
from data_tools.clean.dedup import DedupOptions, find_pairs
from data_tools.clean.job import REPORT_FILE, Cleaning
from data_tools.clean.output import (
    EXAMPLES_FOLDER,
    Decisions,
    OutputWriter,
    move_staged,
    output_files,
    staged_file,
)
from data_tools.clean.shards import ShardSource, ShardWriter
from data_tools.clean.sketch import row_hashes
from data_tools.executors import Advance
from data_tools.inputs import local_part
from data_tools.job import Effort, Stage, one_unit
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart
from megatrain.atomic import commit_bytes
from megatrain.data.format import MANIFEST_FILE, canonical_json
from megatrain.errors import ConfigError, DataError

SIDES = ("train", "validation")
SIDE = np.dtype([(name, np.int64) for name in ("documents", "text_bytes", "tokens", "shard")])
"""What of a task goes to a side, and in a dataset the shard that it becomes; -1 where it is nothing."""


def parse_share(text: str) -> float:
    """The share that `0.1%` or `0.001` names. Raises ConfigError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"--validation {text} should be a share of the documents, such as 0.1% or 0.001.")
    return share


@dataclass(frozen=True)
class HoldOut(Reopening):
    """Which documents are held out: those of clusters whose first document has one of the lowest hashes."""

    runs: Runs
    firsts_path: Path
    share: float

    @cached_property
    def _firsts(self) -> npt.NDArray[np.uint64]:
        return np.memmap(self.firsts_path, np.uint64, "r")

    def __call__(self, part: Any) -> npt.NDArray[np.bool_]:
        """For each document of a part."""
        first, number = int(part["first_document"]), int(part["num_documents"])
        firsts, inverse = np.unique(self._firsts[first : first + number], return_inverse=True)
        held: npt.NDArray[np.bool_] = row_hashes(self.runs.signatures(firsts)) < np.uint64(self.share * 2**64)
        return held[inverse]


@dataclass(frozen=True)
class OneSide:
    """Keeps the documents of one side."""

    hold_out: HoldOut
    side: str

    def keeps(self, part: Any) -> npt.NDArray[np.bool_]:
        held = self.hold_out(part)
        return held if self.side == "validation" else ~held

    def __call__(self, corpus: Corpus, part: Any) -> Decisions:
        kept = self.keeps(part)
        return Decisions(pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(kept), np.int32), mask=kept), [""]), None)


@dataclass(frozen=True)
class Counting(Reopening):
    """Counts what of each task goes to which side, and numbers the shards of a dataset's sides."""

    corpus: Corpus
    hold_out: HoldOut
    folder: Path
    source: ShardSource | None

    @property
    def table_path(self) -> Path:
        return self.folder / "sides.npy"

    @cached_property
    def sides(self) -> npt.NDArray[Any]:
        """For each task and side."""
        table: npt.NDArray[Any] = np.load(self.table_path, mmap_mode="r")
        return table

    def stages(self) -> Iterator[Stage]:
        make_folders(self.folder / "counts", len(self.corpus.tasks))
        yield Stage("count", self.corpus.tasks["num_bytes"].tolist(), self.commit, self.count)
        yield one_unit("number", self.table_path, self.number)

    def commit(self, number: int) -> Path:
        return work_path(self.folder / "counts", number, f"{number:06d}.json")

    def count(self, number: int, advance: Advance) -> None:
        task = self.corpus.tasks[number]
        counts = np.zeros((len(SIDES), 3), np.int64)
        for part in self.corpus.parts[int(task["first_part"]) : int(task["last_part"])]:
            held = self.hold_out(part)
            if self.source is None:
                text_bytes = self.corpus.columns(part, ["text_bytes"]).column(0).to_numpy().astype(np.int64)
                sizes = np.stack([text_bytes, np.zeros_like(text_bytes)], axis=1)
            else:
                sizes = self.source.sizes(self.corpus, part)
            for side, of_side in enumerate((~held, held)):
                counts[side] += (of_side.sum(), *sizes[of_side].sum(axis=0))
        commit_bytes(self.commit(number), orjson.dumps(counts.tolist()))
        advance(int(task["num_bytes"]))

    def number(self) -> None:
        table = np.zeros((len(self.corpus.tasks), len(SIDES)), SIDE)
        for number in range(len(table)):
            for side, counts in enumerate(orjson.loads(self.commit(number).read_bytes())):
                table[number, side] = (*counts, -1)
        for side, name in enumerate(SIDES):
            there = table["documents"][:, side] > 0
            if not there.any():
                raise DataError(
                    f"No document would be on the side of {name}: there are {table['documents'].sum()} in all. "
                    "Give another share with --validation, or more documents."
                )
            table["shard"][there, side] = np.arange(there.sum())
        save_table(self.table_path, table)


class SideWriter(Protocol):
    """Writes what belongs to one side."""

    def stage(self) -> Stage: ...

    def finish(self) -> None:
        """Commit what is to be said of all that the stage has written."""

    def moves(self, target: Path) -> Iterator[tuple[Path, Path]]:
        """Where each file is to be in the folder of the side, and where it lies now. What makes it whole is last."""


@dataclass(frozen=True)
class TextWriter:
    """Writes the texts of one side, as `filter` does."""

    corpus: Corpus
    cleaning: Cleaning
    folder: Path
    side: OneSide

    def stage(self) -> Stage:
        (self.folder / EXAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
        writer = OutputWriter(self.corpus, self.cleaning.read, self.folder, self.side, frozenset())
        return replace(writer.stage(), name=f"write-{self.side.side}")

    def finish(self) -> None:
        """Nothing: texts need no list."""

    def moves(self, target: Path) -> Iterator[tuple[Path, Path]]:
        for _, number, name in (file for write in self.corpus.writes for file in output_files(self.corpus, write)):
            yield result_path(target, number, name, self.corpus.num_files), staged_file(self.folder, number, name)


def split(
    inputs: Sequence[str], validation: float, out: Path, options: DedupOptions, effort: Effort, restart: bool
) -> dict[str, Any] | None:
    """Write the documents to `out`/train and `out`/validation, or go on where an earlier run was stopped.

    Texts become what `filter` writes, a dataset two datasets. Returns the report; None where other processes are to do
    the rest. Raises ConfigError where `out` holds anything else, or for several inputs of which one is a dataset.
    """
    sketch, source = options.sketch(), _dataset(inputs)
    named = inputs if source is None else [f"{source.path}/shard-*.arrow"]
    files = find_inputs_apart(out, named, options.read, effort.say)
    command = {"command": "split", "inputs": list(inputs), "part_bytes": effort.part_bytes, **options.described()}
    command |= {"validation": validation} | ({} if source is None else {"digest": source.dataset.digest})
    cleaning = Cleaning(Origin(command, files), options.read, out, effort, frozenset(SIDES))

    def stages(folder: Path) -> Iterator[Stage]:
        matching = yield from find_pairs(cleaning, sketch, folder)
        runs, corpus = matching.runs, matching.runs.corpus
        yield Clustering(matching, folder / "firsts").stage()
        hold_out = HoldOut(runs, folder / "firsts", validation)
        counting = Counting(corpus, hold_out, folder, source)
        yield from counting.stages()
        writers: dict[str, SideWriter] = {}
        for number, name in enumerate(SIDES):
            side = OneSide(hold_out, name)
            if source is None:
                writers[name] = TextWriter(corpus, cleaning, folder / name, side)
            else:
                writers[name] = ShardWriter(corpus, source, folder / name, side, counting, number, cleaning.origin.name)
            yield writers[name].stage()
        report = partial(_report, cleaning, counting, list(writers.values()), folder / REPORT_FILE)
        yield one_unit("report", folder / REPORT_FILE, report)
        yield one_unit("publish", cleaning.report_path, partial(_publish, cleaning, writers, folder))

    return cleaning.run(restart, stages)


def _dataset(inputs: Sequence[str]) -> ShardSource | None:
    """The dataset that is to be split, if it is one."""
    paths = [path for path in map(local_part, inputs) if path is not None and (path / MANIFEST_FILE).is_file()]
    if not paths:
        return None
    if len(inputs) > 1:
        raise ConfigError(f"{paths[0]} is a tokenized dataset: split it alone, without other inputs.")
    return ShardSource(paths[0])


def _report(cleaning: Cleaning, counting: Counting, writers: list[SideWriter], path: Path) -> None:
    for writer in writers:
        writer.finish()
    table = counting.sides
    kinds = ("documents", "text_bytes", *(() if counting.source is None else ("tokens",)))
    sides = {name: {kind: int(table[kind][:, side].sum()) for kind in kinds} for side, name in enumerate(SIDES)}
    options = {key: value for key, value in cleaning.origin.command.items() if key != "part_bytes"}
    commit_bytes(path, canonical_json({"options": options, **sides, "job": cleaning.origin.name}))


def _publish(cleaning: Cleaning, writers: dict[str, SideWriter], folder: Path) -> None:
    for name, writer in writers.items():
        (cleaning.out / name).mkdir(exist_ok=True)
        move_staged(writer.moves(cleaning.out / name))
    cleaning.report_path.parent.mkdir(exist_ok=True)
    commit_bytes(cleaning.report_path, (folder / REPORT_FILE).read_bytes(), folder)


def render(report: dict[str, Any], out: Path) -> str:
    """A line for each side."""
    total = sum(report[name]["documents"] for name in SIDES)
    return "\n".join(
        f"{out / name}: {report[name]['documents']} documents ({report[name]['documents'] / total:.3%}), "
        f"{report[name]['text_bytes']} bytes of text"
        + (f", {report[name]['tokens']} tokens" if "tokens" in report[name] else "")
        for name in SIDES
    )

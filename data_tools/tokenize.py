"""From text to a dataset: every part of the input encoded and committed, then the shards put together.

Any number of processes that run the same command over a shared folder divide this work: each takes units that no other
works on, then helps with units that others work on, then takes shards in the same way. What is done is on disk; locks
show who does what. With MPI, rank 0 finds and checks the input for all, and ranks wait for each other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data_tools.assemble import Plan, Recipe, ShardWriter, finish_dataset, load_plan, make_plan
from data_tools.encode import Assignment, UnitEncoder
from data_tools.engines import Engine, choose_engine
from data_tools.executors import Progress
from data_tools.locks import WorkLocks, join_command
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart, refuse_occupied
from data_tools.ranks import Ranks
from data_tools.readers import plan_units, read_parts
from data_tools.tokenizer import EOD_TOKEN, TokenizerFile, load_tokenizer
from data_tools.units import PART_BYTES, ReadOptions, Record, Unit
from data_tools.work import PartStore, run_tasks
from megatrain.atomic import commit_bytes
from megatrain.data.format import MANIFEST_FILE, SHARD_TABLE_FILE, SKIPPED_FILE, TOKENIZER_FILE, Manifest, token_dtype
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText, refuse_above
from megatrain.errors import ConfigError, DataError

T = TypeVar("T")

SAMPLE_UNITS = 8
SAMPLE_CHARACTERS = 1 << 16
DEFAULT_SHARD_TOKENS = 1 << 28
MAX_UNKNOWN_OF_SAMPLE = 0.5
"""The share of a sample without tokens from which on the work does not begin."""
MAX_READERS = 8
"""Workers in one file that must be read from its start: more would only decompress, which is some ten times faster
than encoding."""
SEEKING_READERS = 1 << 10
"""Workers in a unit of which each reads only its own parts."""
WORK_FOLDER = ".work"
LOCKS_FILE = "claims"
"""Begins the names of these files."""
COMMAND_FILE = "command.json"


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes of a dataset, beside its inputs and its tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str = EOD_TOKEN
    bos_token: str | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS


@dataclass(frozen=True)
class Effort:
    """How the work is done, which changes no byte of the result."""

    num_workers: int
    engine: str
    progress: Progress
    warn: Callable[[str], None]
    part_bytes: int = PART_BYTES
    """About how much text is committed at a time."""
    max_unknown: float = 0.01
    """How much of the text may have no tokens (0 to 1): if it is more, no dataset is made."""
    worker_seconds: float = 1.0
    """How long a worker process should have to do: for less, to start it costs more than it brings."""
    say: Callable[[str], None] = field(default=lambda _: None, kw_only=True)
    """Shows which inputs there are."""


BYTES_A_SECOND = {"fastokens": 60e6, "tokenizers": 2e6}
"""About what one core encodes."""


@dataclass(frozen=True)
class _Job:
    """What has been found out before the work begins."""

    origin: Origin
    finished: Manifest | None
    """The dataset, where it is there already."""
    tokenizer: TokenizerFile
    units: list[Unit] = field(default_factory=list)
    pending: list[Unit] = field(default_factory=list)
    """Units that are not finished."""
    engine: Engine | None = None
    """For what is pending."""


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: Path,
    out: Path,
    options: TokenizeOptions,
    effort: Effort,
    ranks: Ranks | None = None,
    *,
    restart: bool = False,
) -> Manifest | None:
    """Make the dataset `out`, or go on where an earlier run of the same command was stopped.

    Returns at once where the dataset is there already; None where other processes, not joined by MPI, still work on
    it: the last of them finishes it. Raises ConfigError where something else is in the way.
    """
    ranks = ranks or Ranks()
    if restart and ranks.comm is None and ranks.size > 1:
        raise ConfigError(
            "--restart by several tasks at once would remove what the first of them have done. "
            "Delete the folder before they start, or let one task do it alone."
        )
    locks = WorkLocks(out / WORK_FOLDER / LOCKS_FILE)
    try:
        return _Tokenization(inputs, tokenizer_path, out, options, effort, ranks, restart, locks).run()
    finally:
        locks.close()


@dataclass(frozen=True)
class _Tokenization:
    """The command, in one of the processes that run it."""

    inputs: Sequence[str]
    tokenizer_path: Path
    out: Path
    options: TokenizeOptions
    effort: Effort
    ranks: Ranks
    restart: bool
    locks: WorkLocks

    @cached_property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    @cached_property
    def store(self) -> PartStore:
        return PartStore(self.work)

    def run(self) -> Manifest | None:
        job = self.ranks.share(self.prepare)
        manifest = job.finished
        if manifest is None:
            if not self.locks.is_member:
                self.locks.join()
            manifest = self.make(job)
        self.ranks.wait()
        if self.locks.is_member and self.locks.leave() and manifest is not None:
            shutil.rmtree(self.work)
        return manifest

    def prepare(self) -> _Job:
        """Look at everything, refuse what is wrong, and make the folder: one process does it for all that speak MPI."""
        tokenizer = load_tokenizer(self.tokenizer_path, self.options.eod_token, self.options.bos_token)
        files = find_inputs_apart(self.out, self.inputs, self.options.read, self.effort.say)
        command = {"inputs": list(self.inputs), "tokenizer_sha256": tokenizer.sha256, **asdict(self.options)}
        origin = Origin(command, files)
        if (self.out / MANIFEST_FILE).exists() and not (self.work.exists() or self.restart):
            return _Job(origin, self.finished_before(origin), tokenizer)
        self.refuse_other_things(origin)
        self.join_folder()
        with self.locks.lock("command"):
            if (self.out / MANIFEST_FILE).exists() and not self.restart:
                return _Job(origin, self.finished_before(origin), tokenizer)
            join_command(self.out, self.work / COMMAND_FILE, command, "delete the folder to start over")
            if self.restart:
                self.start_over()
            if not (self.out / TOKENIZER_FILE).exists():
                commit_bytes(self.out / TOKENIZER_FILE, tokenizer.json, scratch=self.work)
        units = list(plan_units(files, self.effort.part_bytes, self.options.read.errors))
        with self.locks.lock("plan"):
            if load_plan(self.store, units):
                return _Job(origin, None, tokenizer, units)
        pending = self.unfinished(list({unit.key: unit for unit in units}.values()))
        return _Job(
            origin, None, tokenizer, units, pending, self.choose_engine(tokenizer, pending) if pending else None
        )

    def choose_engine(self, tokenizer: TokenizerFile, pending: list[Unit]) -> Engine:
        """The engine for these units. Raises DataError where the tokenizer does not know most of a sample of them."""
        sample = _sample(pending, self.options.read)
        engine, warning = choose_engine(self.effort.engine, tokenizer.text_json, [*tokenizer.control, *sample])
        if not tokenizer.loses_nothing:
            counter = UnknownText(Tokenizer(tokenizer.text_json, self.tokenizer_path))
            unknown = counter.count(sample, *engine.encode(sample), ["it"] * len(sample))
            refuse_above(max(self.effort.max_unknown, MAX_UNKNOWN_OF_SAMPLE), unknown, "a sample of the text")
        if warning:
            self.effort.warn(warning)
        return engine

    def make(self, job: _Job) -> Manifest | None:
        """Make what is missing; None where others, not joined by MPI, still work on some of it."""
        engine = job.engine or Engine("tokenizers", job.tokenizer.text_json)
        encoder = UnitEncoder(self.store, self.locks, job.tokenizer, self.options.read, engine)
        if job.pending:
            self.encode(job.pending, engine, encoder)
        self.ranks.wait()
        plan = self.ranks.share(partial(self.plan, job, encoder))
        if plan is None:
            return None
        bos_token = {"bos_token": self.options.bos_token} if self.options.bos_token else {}
        recipe = Recipe(job.tokenizer, {"errors": self.options.read.errors, **bos_token}, self.options.shard_tokens)
        writer = ShardWriter(self.out, self.work, self.locks, recipe)
        num_bytes = len(plan.shards) * self.options.shard_tokens * token_dtype(job.tokenizer.vocab_size).itemsize
        with self.effort.progress("write shards", num_bytes // self.ranks.size) as advance:
            mine, others = _split(plan.shards, self.ranks)
            run_tasks(writer, mine + others, self.effort.num_workers, advance)
        self.ranks.wait()
        return self.ranks.share(partial(self.finish, job.origin, plan, recipe, writer))

    def encode(self, units: list[Unit], engine: Engine, encoder: UnitEncoder) -> None:
        """Encode these units, until they are done or others work on the rest."""
        seconds = sum(unit.text_bytes for unit in units) / self.ranks.size / BYTES_A_SECOND[engine.name]
        worker_seconds, num_workers = self.effort.worker_seconds, self.effort.num_workers
        if worker_seconds:
            num_workers = max(1, min(num_workers, int(seconds / worker_seconds)))
        with self.effort.progress("tokenize", sum(unit.num_bytes for unit in units) // self.ranks.size) as advance:
            run_tasks(encoder, self.assignments(units, num_workers), num_workers, advance)

    def assignments(self, units: list[Unit], num_workers: int) -> Iterator[Assignment]:
        """This rank's share; then what no process has begun; then, as a helper, what others work on."""
        mine, others = _split(units, self.ranks)
        yield from (Assignment(unit, 1) for unit in mine)
        left, num_before = self.unfinished(others + mine), None
        yield from (Assignment(unit, 1) for unit in left)
        while (left := self.unfinished(left)) and len(left) != num_before:
            num_before = len(left)
            for unit in left:
                num_readers = SEEKING_READERS if unit.is_seekable else MAX_READERS
                yield from [Assignment(unit, num_readers)] * min(num_workers, num_readers)

    def unfinished(self, units: list[Unit]) -> list[Unit]:
        names = self.store.names()
        return [unit for unit in units if not self.store.is_finished(unit, names)]

    def plan(self, job: _Job, encoder: UnitEncoder) -> Plan | None:
        """The plan of shards, once all units are finished; None before that."""
        with self.locks.lock("plan"):
            plan = load_plan(self.store, job.units)
            if plan is None:
                # Where a network's file system was slow to show one rank what another had done, a unit may be left.
                left = self.unfinished(job.pending)
                run_tasks(encoder, [Assignment(unit, 1) for unit in left], 1, lambda _: None)
                if self.unfinished(left):
                    return None
                plan = make_plan(self.store, job.units, self.options.shard_tokens)
            refuse_above(self.effort.max_unknown, plan.unknown, "the text")
            return plan

    def finish(self, origin: Origin, plan: Plan, recipe: Recipe, writer: ShardWriter) -> Manifest | None:
        """The manifest, once all shards are written; None before that."""
        with self.locks.lock("manifest"):
            if (self.out / MANIFEST_FILE).exists():
                return Manifest.load(self.out)
            if not all(writer.is_written(shard) for shard in plan.shards):
                return None
            return finish_dataset(self.out, self.work, plan, recipe, origin.name)

    def finished_before(self, origin: Origin) -> Manifest:
        """The manifest of the finished dataset, if this very command made it of these very inputs."""
        manifest = Manifest.load(self.out)
        way_out = "Give another --out, or delete that folder."
        origin.refuse_other(manifest.job, self.out / MANIFEST_FILE, f"{self.out} already holds a dataset", way_out)
        if manifest.unknown is not None:
            refuse_above(self.effort.max_unknown, manifest.unknown, f"the text, of which {self.out} is made")
        return manifest

    def refuse_other_things(self, origin: Origin) -> None:
        """Raise ConfigError where `out` is not a folder that this command may write to."""
        if not (self.restart and (self.out / MANIFEST_FILE).exists()):
            refuse_occupied(self.out, self.work)
        elif Manifest.load(self.out).job[:32] != origin.command_name:
            raise ConfigError(
                f"--restart replaces only what the same command has made, and another one made {self.out}. "
                "Give another --out, or delete that folder."
            )

    def join_folder(self) -> None:
        """Make the folder and join it; again, if the last one to leave removed it at this moment."""
        while not self.locks.is_member:
            self.work.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self.locks.join()

    def start_over(self) -> None:
        """Remove what this command has made, by the names that it gives, and nothing else."""
        if not self.locks.is_only_member():
            raise ConfigError(f"Another process is at work on {self.out} just now: stop it before --restart.")
        made = {MANIFEST_FILE, TOKENIZER_FILE, SHARD_TABLE_FILE, SKIPPED_FILE}
        # The manifest goes first: what is left without it is an unfinished dataset.
        for path in sorted(self.out.iterdir(), key=lambda path: path.name != MANIFEST_FILE):
            if path.name in made or re.fullmatch(r"shard-\d{6,}\.arrow", path.name):
                path.unlink()
        for path in self.work.iterdir():
            if path.name != COMMAND_FILE and not path.name.startswith(LOCKS_FILE):
                path.unlink()
        self.locks.join()


def _split(items: list[T], ranks: Ranks) -> tuple[list[T], list[T]]:
    """The items that this rank begins with, and all others, nearest first."""
    start, stop = (len(items) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return items[start:stop], items[stop:] + items[:start]


def _sample(units: Sequence[Unit], options: ReadOptions) -> list[str]:
    """Some text from the beginning of some units, spread over all of them."""
    texts = []
    for unit in units[:: -(-len(units) // SAMPLE_UNITS)]:
        remaining = SAMPLE_CHARACTERS
        # Broken input is reported by the worker that comes to it, when what is before it has been committed.
        with suppress(DataError):
            for _, record in (row for part in islice(read_parts(unit, options), 1) for row in part.rows):
                if isinstance(record, Record):
                    texts.append(record.text[:remaining])
                    remaining -= len(texts[-1])
                if remaining <= 0:
                    break
    return texts

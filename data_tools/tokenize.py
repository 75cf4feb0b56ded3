"""From text to a dataset: every part of the input encoded and committed, then the shards put together.

Any number of processes that run the same command over a shared folder do this together: each takes units that nobody is
at, then helps with those that somebody is, then the shards in the same way. What is done lies on disk; who does what is
said by claims. MPI, where there is one, saves looking: rank 0 finds and checks the input, and all wait for each other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data_tools.assemble import Plan, Recipe, ShardWriter, finish_dataset, load_plan, make_plan
from data_tools.claims import Claims, join_command
from data_tools.encode import Assignment, UnitEncoder
from data_tools.engines import Engine, choose_engine
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart, refuse_occupied
from data_tools.ranks import Ranks
from data_tools.readers import plan_units, read_parts
from data_tools.tokenizer import EOD_TOKEN, TokenizerFile, load_tokenizer
from data_tools.units import PART_BYTES, ReadOptions, Record, Unit
from data_tools.work import PartStore, Progress, run_tasks
from megatrain.atomic import commit_bytes
from megatrain.data.format import MANIFEST_FILE, SHARD_TABLE_FILE, SKIPPED_FILE, TOKENIZER_FILE, Manifest, token_dtype
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText, refuse_above
from megatrain.errors import ConfigError, DataError

T = TypeVar("T")

SAMPLE_UNITS = 8
SAMPLE_CHARACTERS = 1 << 16
DEFAULT_SHARD_TOKENS = 1 << 28
HOPELESS = 0.5
"""The share of a sample without tokens from which on the work does not begin."""
MAX_READERS = 8
"""Workers in one file that must be read from its start: more would only decompress, which is some ten times faster
than encoding."""
SEEKING_READERS = 1 << 10
"""Workers in a unit of which each reads only its own parts."""
WORK_FOLDER = ".work"
CLAIMS_FILE = "claims"
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
    """Is told which inputs there are."""


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

    Returns at once where the dataset is there already; None where other processes, not joined by MPI, are still at work
    on it: the last of them finishes it. Raises ConfigError where something else is in the way.
    """
    ranks = ranks or Ranks()
    if restart and ranks.comm is None and ranks.size > 1:
        raise ConfigError(
            "--restart by several tasks at once would remove what the first of them have done. "
            "Delete the folder before they start, or let one task do it alone."
        )
    work = out / WORK_FOLDER
    claims = Claims(work / CLAIMS_FILE)
    try:
        job = ranks.share(partial(_prepare, inputs, tokenizer_path, out, options, effort, claims, restart))
        manifest = job.finished
        if manifest is None:
            if not claims.is_member:
                claims.join()
            manifest = _make(out, job, options, effort, claims, ranks)
        ranks.wait()
        if claims.is_member and claims.leave() and manifest is not None:
            shutil.rmtree(work)
    finally:
        claims.close()
    return manifest


def _prepare(
    inputs: Sequence[str],
    tokenizer_path: Path,
    out: Path,
    options: TokenizeOptions,
    effort: Effort,
    claims: Claims,
    restart: bool,
) -> _Job:
    """Look at everything, refuse what is wrong, and make the folder: what one process does for all that speak MPI."""
    tokenizer = load_tokenizer(tokenizer_path, options.eod_token, options.bos_token)
    files = find_inputs_apart(out, inputs, options.read, effort.say)
    command = {"inputs": list(inputs), "tokenizer_sha256": tokenizer.sha256, **asdict(options)}
    origin = Origin(command, files)
    work = out / WORK_FOLDER
    if (out / MANIFEST_FILE).exists() and not (work.exists() or restart):
        return _Job(origin, _finished(out, origin, effort), tokenizer)
    _refuse_other_things(out, work, origin, restart)
    _join_folder(work, claims)
    with claims.hold("command"):
        if (out / MANIFEST_FILE).exists() and not restart:
            return _Job(origin, _finished(out, origin, effort), tokenizer)
        join_command(out, work / COMMAND_FILE, command, "delete the folder to start over")
        if restart:
            _start_over(out, work, claims)
        if not (out / TOKENIZER_FILE).exists():
            commit_bytes(out / TOKENIZER_FILE, tokenizer.json, scratch=work)
    units = list(plan_units(files, effort.part_bytes, options.read.errors))
    store = PartStore(work)
    with claims.hold("plan"):
        if load_plan(store, units):
            return _Job(origin, None, tokenizer, units)
    pending = _unfinished(list({unit.key: unit for unit in units}.values()), store)
    engine = None
    if pending:
        sample = _sample(pending, options.read)
        engine, warning = choose_engine(effort.engine, tokenizer.text_json, [*tokenizer.control, *sample])
        if not tokenizer.loses_nothing:
            counter = UnknownText(Tokenizer(tokenizer.text_json, tokenizer_path))
            unknown = counter.count(sample, *engine.encode(sample), ["it"] * len(sample))
            refuse_above(max(effort.max_unknown, HOPELESS), unknown, "a sample of the text")
        if warning:
            effort.warn(warning)
    return _Job(origin, None, tokenizer, units, pending, engine)


def _make(
    out: Path, job: _Job, options: TokenizeOptions, effort: Effort, claims: Claims, ranks: Ranks
) -> Manifest | None:
    """Everything that is not there yet; None where others, not joined by MPI, are still at some of it."""
    work = out / WORK_FOLDER
    store = PartStore(work)
    engine = job.engine or Engine("tokenizers", job.tokenizer.text_json)
    encoder = UnitEncoder(store, claims, job.tokenizer, options.read, engine)
    _encode(job, engine, encoder, store, effort, ranks)
    ranks.wait()
    plan = ranks.share(partial(_plan, job, encoder, store, options, effort, claims))
    if plan is None:
        return None
    how = {"errors": options.read.errors, **({"bos_token": options.bos_token} if options.bos_token else {})}
    recipe = Recipe(job.tokenizer, how, options.shard_tokens)
    writer = ShardWriter(out, work, claims, recipe)
    shards_bytes = len(plan.shards) * options.shard_tokens * token_dtype(job.tokenizer.vocab_size).itemsize
    with effort.progress("write shards", shards_bytes // ranks.size) as advance:
        mine, others = _split(plan.shards, ranks)
        run_tasks(writer, mine + others, effort.num_workers, advance)
    ranks.wait()
    return ranks.share(partial(_finish, out, plan, recipe, writer, claims, job.origin))


def _encode(job: _Job, engine: Engine, encoder: UnitEncoder, store: PartStore, effort: Effort, ranks: Ranks) -> None:
    """Encode what is pending, until it is done or others are at the rest of it."""
    if not job.pending:
        return
    seconds = sum(unit.text_bytes for unit in job.pending) / ranks.size / BYTES_A_SECOND[engine.name]
    enough_workers = int(seconds / effort.worker_seconds) if effort.worker_seconds else effort.num_workers
    num_workers = max(1, min(effort.num_workers, enough_workers))
    with effort.progress("tokenize", sum(unit.num_bytes for unit in job.pending) // ranks.size) as advance:
        run_tasks(encoder, _assignments(job.pending, store, num_workers, ranks), num_workers, advance)


def _assignments(units: list[Unit], store: PartStore, num_workers: int, ranks: Ranks) -> Iterator[Assignment]:
    """This rank's share; then what nobody has begun; then, as a helper, what somebody is at."""
    mine, others = _split(units, ranks)
    yield from (Assignment(unit, 1) for unit in mine)
    left = _unfinished(others + mine, store)
    yield from (Assignment(unit, 1) for unit in left)
    num_before = len(left) + 1
    left = _unfinished(left, store)
    while left and len(left) < num_before:
        for unit in left:
            num_readers = SEEKING_READERS if unit.is_seekable else MAX_READERS
            yield from [Assignment(unit, num_readers)] * min(num_workers, num_readers)
        num_before = len(left)
        left = _unfinished(left, store)


def _split(items: list[T], ranks: Ranks) -> tuple[list[T], list[T]]:
    """The items that this rank begins with, and all others, nearest first."""
    start, stop = (len(items) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return items[start:stop], items[stop:] + items[:start]


def _unfinished(units: list[Unit], store: PartStore) -> list[Unit]:
    names = store.names()
    return [unit for unit in units if not store.is_finished(unit, names)]


def _plan(
    job: _Job, encoder: UnitEncoder, store: PartStore, options: TokenizeOptions, effort: Effort, claims: Claims
) -> Plan | None:
    """The plan of shards, once all units are finished; None before that."""
    with claims.hold("plan"):
        plan = load_plan(store, job.units)
        if plan is None:
            # Where a network's file system was slow to show one rank what another had done, a unit may have been left.
            left = _unfinished(job.pending, store)
            run_tasks(encoder, [Assignment(unit, 1) for unit in left], 1, lambda _: None)
            if _unfinished(left, store):
                return None
            plan = make_plan(store, job.units, options.shard_tokens)
        refuse_above(effort.max_unknown, plan.unknown, "the text")
        return plan


def _finish(
    out: Path, plan: Plan, recipe: Recipe, writer: ShardWriter, claims: Claims, origin: Origin
) -> Manifest | None:
    """The manifest, once all shards are written; None before that."""
    with claims.hold("manifest"):
        if (out / MANIFEST_FILE).exists():
            return Manifest.load(out)
        if not all(writer.is_written(shard) for shard in plan.shards):
            return None
        return finish_dataset(out, out / WORK_FOLDER, plan, recipe, origin.name)


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


def _finished(out: Path, origin: Origin, effort: Effort) -> Manifest:
    """The manifest of the finished dataset `out`, if this very command made it of these very inputs."""
    manifest = Manifest.load(out)
    way_out = "Give another --out, or delete that folder."
    origin.refuse_other(manifest.job, out / MANIFEST_FILE, f"{out} already holds a dataset", way_out)
    if manifest.unknown is not None:
        refuse_above(effort.max_unknown, manifest.unknown, f"the text, of which {out} is made")
    return manifest


def _refuse_other_things(out: Path, work: Path, origin: Origin, restart: bool) -> None:
    """Raise ConfigError where `out` is not a folder that this command may write to."""
    if not (restart and (out / MANIFEST_FILE).exists()):
        refuse_occupied(out, work)
    elif Manifest.load(out).job[:32] != origin.command_name:
        raise ConfigError(
            f"--restart replaces only what the same command has made, and another one made {out}. "
            "Give another --out, or delete that folder."
        )


def _join_folder(work: Path, claims: Claims) -> None:
    """Make the folder, and be at work in it; again, if the last one to leave removed it at this moment."""
    while not claims.is_member:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            claims.join()


def _start_over(out: Path, work: Path, claims: Claims) -> None:
    """Remove what this command has made, by the names that it gives, and nothing else."""
    if not claims.is_alone():
        raise ConfigError(f"Another process is at work on {out} just now: stop it before --restart.")
    made = {MANIFEST_FILE, TOKENIZER_FILE, SHARD_TABLE_FILE, SKIPPED_FILE}
    # The manifest goes first: what is left without it is an unfinished dataset.
    for path in sorted(out.iterdir(), key=lambda path: path.name != MANIFEST_FILE):
        if path.name in made or re.fullmatch(r"shard-\d{6,}\.arrow", path.name):
            path.unlink()
    for path in work.iterdir():
        if path.name != COMMAND_FILE and not path.name.startswith(CLAIMS_FILE):
            path.unlink()
    claims.join()

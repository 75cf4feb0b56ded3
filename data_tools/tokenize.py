"""From text to a dataset: every part of the input encoded and committed, then the shards put together.

Stages: `encode` (units of the input), `plan` (which documents go into which shard), `shards`, `manifest`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from data_tools import job
from data_tools.assemble import Assembly, Recipe
from data_tools.conversations import Conversations
from data_tools.encode import UnitEncoder
from data_tools.engines import Engine, choose_engine
from data_tools.executors import Advance, Place, Progress
from data_tools.folder import OutputFolder
from data_tools.job import Records, Stage, committed_names, one_unit
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart
from data_tools.readers import plan_commits, read_parts
from data_tools.supervised import PromptAndAnswer
from data_tools.tokenizer import EOD_TOKEN, TokenizerFile, load_tokenizer
from data_tools.units import PART_BYTES, ReadOptions, Record, Unit
from data_tools.work import PartStore
from megatrain.atomic import commit_bytes
from megatrain.data.format import (
    MANIFEST_FILE,
    SHARD_TABLE_FILE,
    SKIPPED_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILE,
    Manifest,
    checksum,
    token_dtype,
)
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText, refuse_above
from megatrain.errors import ConfigError, DataError

SAMPLE_UNITS = 8
SAMPLE_CHARACTERS = 1 << 16
SAMPLE_BYTES = 1 << 18
"""Read of a unit that can be read in pieces: JSON has some more bytes than its text has characters."""
DEFAULT_SHARD_TOKENS = 1 << 28
MAX_UNKNOWN_OF_SAMPLE = 0.5
"""The share of a sample without tokens from which on the work does not begin."""
PARTS_FOLDER = "parts"
FILES_IN_FOLDER = 500
"""About; at most 1,000."""


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes of a dataset, beside its inputs and its tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str = EOD_TOKEN
    bos_token: str | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    supervision: PromptAndAnswer | Conversations | None = None
    """Of which answers alone are scored; with `read.fields`."""


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
    place: Place | None = field(default=None, kw_only=True)
    stage: str | None = field(default=None, kw_only=True)

    @property
    def of_stages(self) -> job.Effort:
        """What stages of any command need to know of it."""
        shared = (self.num_workers, self.progress, self.part_bytes)
        return job.Effort(*shared, say=self.say, place=self.place, stage=self.stage)


BYTES_A_SECOND = {"fastokens": 60e6, "tokenizers": 2e6}
"""About what one core encodes."""


def tokenize(
    inputs: Sequence[str],
    tokenizer_path: Path,
    out: Path,
    options: TokenizeOptions,
    effort: Effort,
    *,
    restart: bool = False,
) -> Manifest | None:
    """Make the dataset `out`, or go on where an earlier run of the same command was stopped.

    Returns at once where the dataset is there already; None where others are to do the rest of it. Raises ConfigError
    where something else is in the way.
    """
    tokenizer = load_tokenizer(tokenizer_path, options.eod_token, options.bos_token)
    files = find_inputs_apart(out, inputs, options.read, effort.say)
    supervision, named = options.supervision, None
    if supervision is not None:
        for note in supervision.notes:
            effort.say(note)
        named = {**supervision.named, **{name: checksum(data).hex() for name, data in supervision.files.items()}}
    given = {**asdict(replace(options, supervision=None)), "supervision": named}
    origin = Origin({"inputs": list(inputs), "tokenizer_sha256": tokenizer.sha256, **given}, files)
    folder = OutputFolder(out, out / MANIFEST_FILE, _is_made)
    if folder.is_finished and not restart:
        manifest = _finished_before(folder, origin, effort)
        folder.close()
        return manifest
    if folder.is_finished and Manifest.load(out).job[:32] != origin.command_name:
        raise ConfigError(
            f"--restart replaces only what the same command has made, and another one made {out}. "
            "Give another --out, or delete that folder."
        )
    stages = _Stages(folder, origin, tokenizer, options, effort)
    return Manifest.load(out) if folder.run(origin, effort.of_stages, restart, stages) else None


def _is_made(path: Path) -> bool:
    made = {MANIFEST_FILE, TOKENIZER_FILE, SHARD_TABLE_FILE, SKIPPED_FILE, *TEMPLATE_FILES}
    return path.name in made or re.fullmatch(r"shard-\d{6,}\.arrow", path.name) is not None


def _finished_before(folder: OutputFolder, origin: Origin, effort: Effort) -> Manifest:
    """The manifest of the finished dataset, if this very command made it of these very inputs."""
    out = folder.out
    manifest = Manifest.load(out)
    way_out = "Give another --out, or delete that folder."
    origin.refuse_other(manifest.job, folder.finished, f"{out} already holds a dataset", way_out)
    if manifest.unknown is not None:
        refuse_above(effort.max_unknown, manifest.unknown, f"the text, of which {out} is made")
    return manifest


@dataclass(frozen=True)
class _Units:
    """The units of the input, by number, and where what is made of them lies."""

    table: Records
    store: PartStore

    def __getitem__(self, number: int) -> Unit:
        return Unit.load(self.table[number])

    def __iter__(self) -> Iterator[Unit]:
        return map(Unit.load, self.table)

    def commit(self, number: int) -> Path:
        return self.store.commit(self[number])


@dataclass(frozen=True)
class _Encoding:
    """Encodes units, until the shards are planned: parts may be gone from then on."""

    units: _Units
    encoder: UnitEncoder
    plan_path: Path

    def __call__(self, number: int, advance: Advance) -> None:
        if self.plan_path.name not in committed_names(self.plan_path.parent):
            self.encoder(self.units[number], advance)


@dataclass(frozen=True)
class _Stages:
    """The stages of the command, called with the folder for what depends on these very inputs."""

    output: OutputFolder
    origin: Origin
    tokenizer: TokenizerFile
    options: TokenizeOptions
    effort: Effort

    def __call__(self, folder: Path) -> Iterator[Stage]:
        out = self.output.out
        if not (out / TOKENIZER_FILE).exists():
            commit_bytes(out / TOKENIZER_FILE, self.tokenizer.json, folder)
        bos_token = {"bos_token": self.options.bos_token} if self.options.bos_token else {}
        supervision = self.options.supervision
        named = {} if supervision is None else supervision.named
        options = {"errors": self.options.read.errors, **bos_token, **named}
        recipe = Recipe(self.tokenizer, options, self.options.shard_tokens, supervision)
        units = self.list_units(folder)
        assembly = Assembly(out, folder, units.store, recipe, self.origin.name, self.effort.of_stages.memory)
        yield self.encode(units, assembly)
        yield one_unit("plan", assembly.plan_path, partial(assembly.make_plan, units))
        refuse_above(self.effort.max_unknown, assembly.plan.unknown, "the text")
        shard_bytes = self.options.shard_tokens * token_dtype(self.tokenizer.vocab_size).itemsize
        num_bytes = [shard_bytes] * len(assembly.shard_plans)
        yield Stage("shards", num_bytes, assembly.stats_path, assembly.write_shard)
        yield one_unit("manifest", self.output.finished, assembly.finish)

    def list_units(self, folder: Path) -> _Units:
        """The units, as they were cut when the command was first given, and the store of their parts."""
        table = folder / "units.arrow"
        if table.name not in committed_names(folder):
            effort = self.effort.of_stages
            how = (effort.part_bytes, self.options.read.errors, effort.max_workers, effort.memory)
            units = plan_commits(self.origin.files, *how)
            Records.write(table, units)
        records = Records(table)
        stores = sorted(self.output.work.glob(f"{PARTS_FOLDER}-*"))
        num_folders = int(stores[0].name.rpartition("-")[2]) if stores else -(-len(records) // FILES_IN_FOLDER)
        store = PartStore(self.output.work / f"{PARTS_FOLDER}-{num_folders}", max(num_folders, 1))
        store.make_folders()
        return _Units(records, store)

    def encode(self, units: _Units, assembly: Assembly) -> Stage:
        """The stage of encoding; it has nothing to do once the shards are planned."""
        is_planned = assembly.plan_path.name in committed_names(assembly.folder)
        listed = [] if is_planned else list(units)
        stage = Stage("encode", [unit.num_bytes for unit in listed], units.commit, lambda number, advance: None)
        missing = [listed[number] for number in stage.missing()]
        if not missing:
            return stage
        supervision = self.options.supervision
        engine = self.choose_engine(missing) if supervision is None else Engine("tokenizers", self.tokenizer.text_json)
        encoder = UnitEncoder(units.store, self.tokenizer, self.options.read, engine, supervision)
        stage = replace(stage, run=_Encoding(units, encoder, assembly.plan_path))
        if not self.effort.worker_seconds:
            return stage
        seconds = sum(unit.text_bytes / unit.num_readers for unit in missing) / BYTES_A_SECOND[engine.name]
        return replace(stage, max_workers=int(seconds / self.effort.worker_seconds))

    def choose_engine(self, units: list[Unit]) -> Engine:
        """The engine for these units. Raises DataError where the tokenizer does not know most of a sample of them."""
        tokenizer, effort = self.tokenizer, self.effort
        sample = _sample(units, self.options.read)
        engine, warning = choose_engine(effort.engine, tokenizer.text_json, [*tokenizer.control, *sample])
        if not tokenizer.loses_nothing:
            counter = UnknownText(Tokenizer(tokenizer.text_json, "the tokenizer"))
            unknown = counter.count(sample, *engine.encode(sample), ["it"] * len(sample))
            refuse_above(max(effort.max_unknown, MAX_UNKNOWN_OF_SAMPLE), unknown, "a sample of the text")
        if warning:
            effort.warn(warning)
        return engine


def _sample(units: Sequence[Unit], options: ReadOptions) -> list[str]:
    """Some text from the beginning of some units, spread over all of them."""
    texts = []
    for unit in units[:: -(-len(units) // SAMPLE_UNITS)]:
        remaining = SAMPLE_CHARACTERS
        # Broken input is reported by the worker that comes to it, when what is before it has been committed.
        with suppress(DataError):
            parts = islice(read_parts(unit.beginning(SAMPLE_BYTES), options), 1)
            for _, record in (row for part in parts for row in part.rows):
                if isinstance(record, Record):
                    texts.append(record.text[:remaining])
                    remaining -= len(texts[-1])
                if remaining <= 0:
                    break
    return texts

"""From text to a dataset of tokens: what decides its bytes, and which encoder makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_tools import job
from data_tools.assemble import Made, Plan, document_hashes
from data_tools.conversations import Conversations
from data_tools.dataset_job import make_dataset
from data_tools.encode import UnitEncoder
from data_tools.engines import Engine, choose_engine
from data_tools.executors import Place, Progress
from data_tools.job import ANY_WORKERS
from data_tools.labeled import LabeledText
from data_tools.origin import Origin
from data_tools.outputs import find_inputs_apart
from data_tools.readers import read_parts
from data_tools.supervised import PromptAndAnswer, SourceAndTarget, Supervision, nothing_left_error
from data_tools.tokenizer import EOD_TOKEN, TokenizerFile, load_tokenizer
from data_tools.units import PART_BYTES, ReadOptions, Record, Unit, no_text_error
from data_tools.work import PartStore
from megatrain.atomic import commit_bytes
from megatrain.data.format import (
    SCORED,
    TARGET_TOKENIZER_FILE,
    TOKENIZER_FILE,
    Manifest,
    checksum,
    content_digest,
    document_schema,
    token_dtype,
)
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText, refuse_above
from megatrain.errors import DataError

SAMPLE_UNITS = 8
SAMPLE_CHARACTERS = 1 << 16
SAMPLE_BYTES = 1 << 18
"""Read of a unit that can be read in pieces: JSON has some more bytes than its text has characters."""
DEFAULT_SHARD_TOKENS = 1 << 28
MAX_UNKNOWN_OF_SAMPLE = 0.5
"""The share of a sample without tokens from which on the work does not begin."""


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes of a dataset, beside its inputs and its tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str = EOD_TOKEN
    bos_token: str | None = None
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    supervision: PromptAndAnswer | SourceAndTarget | Conversations | LabeledText | None = None
    """Of which answers alone are scored, or which have labels; with `read.fields`."""


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
    text = _Text(tokenizer, options, effort)
    if not make_dataset(out, origin, files, text, effort.of_stages, restart=restart):
        return None
    manifest = Manifest.load(out)
    if manifest.unknown is not None:  # of a dataset that was there already, too
        refuse_above(effort.max_unknown, manifest.unknown, f"the text, of which {out} is made")
    return manifest


@dataclass(frozen=True)
class TextRecipe:
    """What, beside the documents, goes into the files of a dataset of text."""

    tokenizer: TokenizerFile
    options: dict[str, str]
    shard_tokens: int
    supervision: Supervision | None = None

    @property
    def column(self) -> pa.Field | None:
        return None if self.supervision is None else self.supervision.column

    @property
    def files(self) -> Mapping[str, bytes]:
        return {} if self.supervision is None else self.supervision.files

    @property
    def target_tokenizer(self) -> TokenizerFile | None:
        return None if self.supervision is None else self.supervision.target_tokenizer

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids of both tokenizers."""
        target = self.target_tokenizer
        return token_dtype(max(self.tokenizer.vocab_size, 0 if target is None else target.vocab_size))

    @property
    def of_target(self) -> dict[str, Any]:
        """What the manifest says of a tokenizer that targets have of their own."""
        target = self.target_tokenizer
        if target is None:
            return {}
        return {
            "target_tokenizer_sha256": target.sha256,
            "target_vocab_size": target.vocab_size,
            "target_eod_id": target.eod_id,
        }

    @property
    def same_for_all_shards(self) -> dict[str, Any]:
        """What each shard says of the tokenizer."""
        tokenizer = self.tokenizer
        bos = {} if tokenizer.bos_id is None else {"bos_id": tokenizer.bos_id, "bos_token": tokenizer.bos_token}
        return {
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "eod_token": tokenizer.eod_token,
            **bos,
            **self.of_target,
        }

    def schema(self, metadata: dict[str, Any]) -> pa.Schema:
        return document_schema(self.dtype, metadata, self.column)

    def nothing_error(self, plan: Plan, skipped: bytes) -> DataError:
        if self.supervision is not None:
            return nothing_left_error(self.supervision.column, plan.examples, skipped)
        return no_text_error(plan.num_empty, plan.num_skipped)

    def manifest(self, made: Made, plan: Plan) -> bytes:
        tokenizer = self.tokenizer
        names = self.supervision.names_of(plan.labels) if isinstance(self.supervision, LabeledText) else None
        return Manifest(
            template_files={name: checksum(content).hex() for name, content in self.files.items()} or None,
            digest=content_digest(tokenizer.sha256, self.options, names, document_hashes(made.shards)),
            num_shards=len(made.shards),
            num_documents=made.total("documents"),
            num_tokens=made.total("tokens"),
            text_bytes=made.total("text_bytes"),
            num_empty_documents=plan.num_empty,
            num_skipped=plan.num_skipped or None,
            skipped_checksum=made.skipped_checksum,
            num_scored=plan.num_scored if self.column is SCORED else None,
            examples=None if self.supervision is None else plan.examples,
            label_names=names,
            unknown=plan.unknown,
            dtype=self.dtype.name,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            eod_token=tokenizer.eod_token,
            bos_id=tokenizer.bos_id,
            bos_token=tokenizer.bos_token,
            tokenizer_sha256=tokenizer.sha256,
            options=self.options,
            job=made.job,
            shard_table_checksum=made.shard_table_checksum,
            **self.of_target,
        ).dump()


@dataclass(frozen=True)
class _Text:
    """The contents of a dataset of text."""

    tokenizer: TokenizerFile
    options: TokenizeOptions
    effort: Effort

    @property
    def read(self) -> ReadOptions:
        return self.options.read

    @property
    def recipe(self) -> TextRecipe:
        bos_token = {"bos_token": self.options.bos_token} if self.options.bos_token else {}
        supervision = self.options.supervision
        named = {} if supervision is None else supervision.named
        options = {"errors": self.options.read.errors, **bos_token, **named}
        return TextRecipe(self.tokenizer, options, self.options.shard_tokens, supervision)

    @property
    def shard_bytes(self) -> int:
        return self.options.shard_tokens * self.recipe.dtype.itemsize

    def begin(self, out: Path, folder: Path) -> None:
        if not (out / TOKENIZER_FILE).exists():
            commit_bytes(out / TOKENIZER_FILE, self.tokenizer.json, folder)
        target = self.recipe.target_tokenizer
        if target is not None and not (out / TARGET_TOKENIZER_FILE).exists():
            commit_bytes(out / TARGET_TOKENIZER_FILE, target.json, folder)

    def packer(self, store: PartStore, missing: list[Unit]) -> tuple[UnitEncoder, int]:
        supervision = self.options.supervision
        engine = self.choose_engine(missing) if supervision is None else Engine("tokenizers", self.tokenizer.text_json)
        encoder = UnitEncoder(store, self.tokenizer, self.options.read, engine, supervision)
        if not self.effort.worker_seconds:
            return encoder, ANY_WORKERS
        seconds = sum(unit.text_bytes / unit.num_readers for unit in missing) / BYTES_A_SECOND[engine.name]
        return encoder, int(seconds / self.effort.worker_seconds)

    def refuse(self, plan: Plan) -> None:
        refuse_above(self.effort.max_unknown, plan.unknown, "the text")
        if isinstance(self.options.supervision, LabeledText):
            self.options.supervision.refuse_few(plan.labels)

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

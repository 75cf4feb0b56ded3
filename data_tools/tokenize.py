"""From text to a dataset: every unit of the input encoded and committed, then the shards put together."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import orjson

from data_tools.assemble import Recipe, assemble
from data_tools.encode import UnitEncoder
from data_tools.engines import choose_engine
from data_tools.inputs import InputFile, find_inputs
from data_tools.readers import plan_units, read_parts
from data_tools.tokenizer import EOD_TOKEN, TokenizerFile, load_tokenizer
from data_tools.units import PART_BYTES, ReadOptions, Unit
from data_tools.work import Advance, PartStore, run_tasks
from megatrain.data.format import MANIFEST_FILE, TOKENIZER_FILE, Manifest, canonical_json, commit_bytes
from megatrain.errors import ConfigError, DataError

SAMPLE_UNITS = 8
SAMPLE_CHARACTERS = 1 << 16
DEFAULT_SHARD_TOKENS = 1 << 28

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a display for work of a name and a size in bytes; gives the function that hears of bytes done."""


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes of a dataset, beside its inputs and its tokenizer."""

    read: ReadOptions = field(default_factory=ReadOptions)
    eod_token: str = EOD_TOKEN
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


def tokenize(
    inputs: Sequence[str], tokenizer_path: Path, out: Path, options: TokenizeOptions, effort: Effort
) -> Manifest:
    """Make the dataset `out`, or go on where an earlier run of the same command was stopped.

    Returns at once where the dataset is there already. Raises ConfigError where something else is.
    """
    from filelock import FileLock, Timeout

    tokenizer = load_tokenizer(tokenizer_path, options.eod_token)
    files = find_inputs(inputs)
    command = {"inputs": list(inputs), "tokenizer_sha256": tokenizer.sha256, **asdict(options)}
    job = hashlib.sha256(canonical_json([command, [[file.name, file.num_bytes] for file in files]])).hexdigest()
    work = out / ".work"
    if (out / MANIFEST_FILE).exists() and not work.exists():
        return _finished(out, job, files)
    _make_folder(out, work)
    try:
        with FileLock(work / "lock", timeout=0):
            if (out / MANIFEST_FILE).exists():
                manifest = _finished(out, job, files)
            else:
                _join_command(out, work, command)
                commit_bytes(out / TOKENIZER_FILE, tokenizer.json, scratch=work)
                units = list(plan_units(files, effort.part_bytes))
                _encode(units, PartStore(work), tokenizer, options, effort)
                recipe = Recipe(tokenizer, {"errors": options.read.errors}, options.shard_tokens, job)
                with effort.progress(
                    "write shards", sum(path.stat().st_size for path in work.glob("*.arrow"))
                ) as advance:
                    manifest = assemble(out, units, PartStore(work), recipe, effort.num_workers, advance)
            shutil.rmtree(work)
    except Timeout:
        raise ConfigError(f"Another process is writing {out} just now. Wait for it, or give another --out.") from None
    return manifest


def _encode(
    units: Sequence[Unit], store: PartStore, tokenizer: TokenizerFile, options: TokenizeOptions, effort: Effort
) -> None:
    pending = list({unit.key: unit for unit in units if not store.is_finished(unit)}.values())
    if not pending:
        return
    engine, warning = choose_engine(effort.engine, tokenizer.json, _sample(pending, options.read))
    if warning:
        effort.warn(warning)
    encoder = UnitEncoder(store, tokenizer, options.read, engine)
    with effort.progress("tokenize", sum(unit.num_bytes for unit in pending)) as advance:
        run_tasks(encoder, pending, effort.num_workers, advance)


def _sample(units: Sequence[Unit], options: ReadOptions) -> list[str]:
    """Some text from the beginning of some units, spread over all of them."""
    texts = []
    for unit in units[:: -(-len(units) // SAMPLE_UNITS)]:
        remaining = SAMPLE_CHARACTERS
        # Broken input is reported by the worker that comes to it, when what is before it has been committed.
        with suppress(DataError):
            for record in (record for part in islice(read_parts(unit, options), 1) for record in part.rows):
                if record is not None:
                    texts.append(record.text[:remaining])
                    remaining -= len(texts[-1])
                if remaining <= 0:
                    break
    return texts


def _finished(out: Path, job: str, files: Sequence[InputFile]) -> Manifest:
    """The manifest of the finished dataset `out`, if this very command made it."""
    manifest = Manifest.load(out)
    if manifest.job != job:
        raise ConfigError(
            f"{out} already holds a dataset, made from other inputs or with other options. "
            "Give another --out, or delete that folder."
        )
    finished_ns = (out / MANIFEST_FILE).stat().st_mtime_ns
    for file in files:
        if not file.is_remote and int(file.version) > finished_ns:
            raise ConfigError(
                f"{out} already holds a dataset, and {file.name} was changed after it was made. "
                "Give another --out, or delete that folder."
            )
    return manifest


def _make_folder(out: Path, work: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give the name of a folder.")
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out} is a folder with other things in it; give a new or empty one.")
    work.mkdir(parents=True, exist_ok=True)


def _join_command(out: Path, work: Path, command: dict[str, object]) -> None:
    """Record which command this folder belongs to, or check that it is this one."""
    path = work / "command.json"
    if not path.exists():
        commit_bytes(path, canonical_json(command))
        return
    begun = orjson.loads(path.read_bytes())
    differing = [key for key, value in orjson.loads(canonical_json(command)).items() if begun.get(key) != value]
    if differing:
        raise ConfigError(
            f"{out} is unfinished, and was begun by a command with other {', '.join(differing)}. "
            "Run that command again to finish it, give another --out, or delete the folder to start over."
        )

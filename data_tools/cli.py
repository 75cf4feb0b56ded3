"""The command `megatrain-data`: text in, datasets out.

Only what parses the command line is imported here; each command imports what it needs.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatrain.errors import EXIT_DATA, MegatrainError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Text in, datasets out."
)


class Errors(str, Enum):
    """What to do with bytes that are not UTF-8."""

    STRICT = "strict"
    REPLACE = "replace"


class Engine(str, Enum):
    """What encodes the text."""

    AUTO = "auto"
    TOKENIZERS = "tokenizers"
    FASTOKENS = "fastokens"


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files, folders, globs and fsspec URLs: .jsonl (.gz, .zst), .parquet, .arrow, and text files.",
    ),
]
DatasetArgument = Annotated[Path, typer.Argument(metavar="DATASET", help="The folder that `tokenize` wrote.")]
TextKey = Annotated[str, typer.Option(help="The key or column that holds a record's text.")]
ErrorsOption = Annotated[Errors, typer.Option(help="Invalid UTF-8: stop with its place, or keep it with U+FFFD.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


@app.command()
def corpus(out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write to.")]) -> None:
    """A demo corpus of this Python installation's own sources and documentation; nothing is downloaded."""
    from data_tools.corpus import make_corpus

    for name, num_documents, num_bytes in make_corpus(out):
        typer.echo(f"{out / name}: {num_documents} documents, {num_bytes / 1e6:.1f} MB of text")


@app.command("train-tokenizer")
def train_tokenizer_command(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 256 bytes and <|endoftext|> included.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    text_key: TextKey = "text",
    errors: ErrorsOption = Errors.STRICT,
) -> None:
    """Train a byte-level BPE tokenizer; no text is ever unknown to it."""
    from data_tools.tokenizer import train_tokenizer
    from data_tools.units import ReadOptions

    size = train_tokenizer(inputs, vocab_size, out, ReadOptions(text_key, errors=errors.value))
    if size < vocab_size:
        typer.echo(f"The text has no more pairs to merge: {size} tokens instead of {vocab_size}.", err=True)
    typer.echo(f"{out}: {size} tokens")


@app.command()
def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json.")],
    out: Annotated[Path, typer.Option(metavar="DATASET", help="The dataset folder to write.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; one a core unless given.")] = None,
    text_key: TextKey = "text",
    id_key: Annotated[str, typer.Option(help="The key or column that holds a record's id, if it has one.")] = "id",
    shard_tokens: Annotated[int, typer.Option(min=1, help="About how many tokens a shard holds.")] = 2**28,
    errors: ErrorsOption = Errors.STRICT,
    eod_token: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    engine: Annotated[Engine, typer.Option(help="auto: fastokens if it gives the ids of tokenizers.")] = Engine.AUTO,
) -> None:
    """Turn text into a dataset. The same command again goes on where it was stopped."""
    from data_tools.progress import show_progress
    from data_tools.tokenize import Effort, TokenizeOptions
    from data_tools.tokenize import tokenize as run
    from data_tools.units import ReadOptions

    options = TokenizeOptions(ReadOptions(text_key, id_key, errors.value), eod_token, shard_tokens)
    num_workers = workers or _num_cores()
    effort = Effort(num_workers, engine.value, show_progress, lambda text: typer.echo(f"Warning: {text}", err=True))
    manifest = run(inputs, tokenizer, out, options, effort)
    typer.echo(
        f"{out}: {manifest.num_documents} documents, {manifest.num_tokens} tokens ({manifest.dtype}), "
        f"{manifest.text_bytes / 1e6:.1f} MB of text, {manifest.num_shards} shards, "
        f"{manifest.num_empty_documents} empty documents left out, digest {manifest.digest}"
    )


@app.command()
def inspect(
    dataset: DatasetArgument,
    document: Annotated[int | None, typer.Option(metavar="K", help="Document K (from 0), text and tokens.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a dataset holds: counts, lengths, and a document as text beside its tokens."""
    from data_tools.inspect import describe, describe_json, show

    if as_json:
        sys.stdout.buffer.write(describe_json(describe(dataset, document)))
    else:
        show(dataset, document)


@app.command()
def verify(dataset: DatasetArgument) -> None:
    """Check every byte of a dataset: checksums, structure, and the digest computed anew."""
    from data_tools.progress import show_progress
    from data_tools.verify import verify_dataset

    manifest = verify_dataset(dataset, show_progress)
    typer.echo(f"{dataset} is whole: {manifest.num_documents} documents, {manifest.num_tokens} tokens.")


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Run the command line; an error that a user can cause is one paragraph and its exit code."""
    try:
        app()
    except MegatrainError as error:
        typer.echo(f"megatrain-data: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone: keep Python's own flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        typer.echo(f"megatrain-data: {error.filename or 'a file'}: {error.strerror or error}.", err=True)
        sys.exit(EXIT_DATA)

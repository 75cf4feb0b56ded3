"""The command `megatrain-data`: text in, datasets out.

Only what parses the command line is imported here; each command imports what it needs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from data_tools.outputs import local_path, saying_what_is_full
from megatrain.errors import EXIT_DATA, MegatrainError

if TYPE_CHECKING:
    from data_tools.clean.job import Effort
    from data_tools.ranks import Ranks


class Commands(TyperGroup):
    """The commands; one whose reader has gone (`| head`) ends in silence, as it would by the signal."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Keep Python's own flush at exit from complaining.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        return result


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text in, datasets out.",
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


class Method(str, Enum):
    """Which documents are the same."""

    EXACT = "exact"
    MINHASH = "minhash"


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files, folders, globs and fsspec URLs: .jsonl (.gz, .zst), .parquet, .arrow, and text files.",
    ),
]
DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="The folder that `tokenize` wrote, or an address of a copy.")
]
TextKey = Annotated[str, typer.Option(help="The key or column that holds a record's text.")]
IdKey = Annotated[str, typer.Option(help="The key or column that holds a record's id, if it has one.")]
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="Worker processes; one a core unless given.")]
CleanOut = Annotated[
    Path, typer.Option(metavar="DIR", parser=local_path, help="The folder to write to: .jsonl.zst, and .report in it.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Start over, whatever an earlier such command left there.")]
ErrorsOption = Annotated[Errors, typer.Option(help="Invalid UTF-8: stop with its place, or keep it with U+FFFD.")]
EverythingOption = Annotated[bool, typer.Option("--all", help="Count all of it, not a sample of 64 record batches.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=local_path, help="The folder to write to.")],
) -> None:
    """A demo corpus of this Python installation's own sources and documentation; nothing is downloaded."""
    from data_tools.corpus import make_corpus

    with saying_what_is_full(out):
        written = make_corpus(out)
    for name, num_documents, num_bytes in written:
        typer.echo(f"{out / name}: {num_documents} documents, {num_bytes / 1e6:.1f} MB of text")


@app.command("train-tokenizer")
def train_tokenizer_command(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(max=1 << 24, help="Tokens, the 256 bytes and <|endoftext|> included.")],
    out: Annotated[Path, typer.Option(metavar="FILE", parser=local_path, help="The tokenizer.json to write.")],
    special_token: Annotated[
        list[str] | None,
        typer.Option(help="A token that no text becomes, such as <|fim_prefix|>; may be given several times."),
    ] = None,
    text_key: TextKey = "text",
    errors: ErrorsOption = Errors.STRICT,
) -> None:
    """Train a byte-level BPE tokenizer; no text is ever unknown to it."""
    from data_tools.tokenizer import train_tokenizer
    from data_tools.units import ReadOptions

    with saying_what_is_full(out):
        size = train_tokenizer(inputs, vocab_size, out, ReadOptions(text_key, errors=errors.value), special_token or [])
    if size < vocab_size:
        typer.echo(f"The text has no more pairs to merge: {size} tokens instead of {vocab_size}.", err=True)
    typer.echo(f"{out}: {size} tokens")


@app.command()
def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder with one.")],
    out: Annotated[Path, typer.Option(metavar="DATASET", parser=local_path, help="The dataset folder to write.")],
    workers: Workers = None,
    text_key: TextKey = "text",
    id_key: IdKey = "id",
    shard_tokens: Annotated[int, typer.Option(min=1, max=1 << 48, help="About how many tokens a shard holds.")] = 2**28,
    errors: ErrorsOption = Errors.STRICT,
    eod_token: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    bos_token: Annotated[str | None, typer.Option(help="A token to begin each document with, such as <s>.")] = None,
    engine: Annotated[Engine, typer.Option(help="auto: fastokens if it gives the ids of tokenizers.")] = Engine.AUTO,
    max_unknown: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The most of the text (a share) that may have no tokens.")
    ] = 0.01,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over: remove what this command has made before.")
    ] = False,
) -> None:
    """Turn text into a dataset. The same command again goes on where it was stopped.

    Under mpirun or srun, as a SLURM array, or started several times over one file system, all share the work.
    """
    from data_tools.progress import no_progress, show_progress
    from data_tools.ranks import find_ranks
    from data_tools.tokenize import Effort, TokenizeOptions
    from data_tools.tokenize import tokenize as run
    from data_tools.units import ReadOptions
    from data_tools.work import limit_threads

    options = TokenizeOptions(ReadOptions(text_key, id_key, errors.value), eod_token, bos_token, shard_tokens)
    ranks = find_ranks()
    num_workers = workers or ranks.num_cores()
    limit_threads(min(num_workers, ranks.num_cores()))
    progress = show_progress if ranks.reports else no_progress
    effort = Effort(
        num_workers,
        engine.value,
        progress,
        lambda text: typer.echo(f"Warning: {text}", err=True),
        max_unknown=max_unknown,
    )
    with _ending_all(ranks), saying_what_is_full(out):
        manifest = run(inputs, tokenizer, out, options, effort, ranks, restart=restart)
    if not ranks.reports:
        return
    if manifest is None:
        typer.echo(f"{out}: others are still at work on it; the last of them to end finishes it.")
        return
    typer.echo(
        f"{out}: {manifest.num_documents} documents, {manifest.num_tokens} tokens ({manifest.dtype}), "
        f"{manifest.text_bytes / 1e6:.1f} MB of text, {manifest.num_shards} shards, "
        f"{manifest.num_empty_documents} empty documents left out, digest {manifest.digest}"
    )
    if manifest.unknown and manifest.unknown.characters:
        typer.echo(f"Warning: the tokenizer has no tokens for {manifest.unknown}", err=True)


@app.command()
def dedup(
    inputs: Inputs,
    out: CleanOut,
    method: Annotated[Method, typer.Option(help="exact: the same characters; minhash: nearly.")] = Method.EXACT,
    threshold: Annotated[float, typer.Option(help="minhash: Jaccard index of shingles from which on.")] = 0.8,
    num_permutations: Annotated[int, typer.Option(help="minhash: size of a signature.")] = 256,
    ngram: Annotated[int, typer.Option(help="minhash: words in a shingle.")] = 5,
    workers: Workers = None,
    text_key: TextKey = "text",
    id_key: IdKey = "id",
    errors: ErrorsOption = Errors.STRICT,
    restart: Restart = False,
) -> None:
    """Leave out documents that are the same, or nearly, as an earlier one. The same command again goes on."""
    from data_tools.clean.dedup import DedupOptions
    from data_tools.clean.dedup import dedup as run
    from data_tools.units import ReadOptions

    read = ReadOptions(text_key, id_key, errors.value, whole_records=True)
    options = DedupOptions(read, method.value, threshold, num_permutations, ngram)
    _clean(out, workers, lambda effort: run(inputs, out, options, effort, restart))


def _clean(out: Path, workers: int | None, work: Callable[[Effort], dict[str, Any]]) -> None:
    """Do the work of `dedup` or `filter`, as one of however many processes, and show its report."""
    from data_tools.clean.job import Effort
    from data_tools.clean.report import render
    from data_tools.progress import no_progress, show_progress
    from data_tools.ranks import find_ranks

    ranks = find_ranks()
    effort = Effort(workers or ranks.num_cores(), show_progress if ranks.reports else no_progress, ranks)
    with _ending_all(ranks), saying_what_is_full(out):
        report = work(effort)
    if ranks.reports:
        typer.echo(f"{render(report)}\nThis report, and the list of what was dropped: {out / '.report'}")


@app.command("filter")
def filter_command(
    inputs: Inputs,
    out: CleanOut,
    filters: Annotated[str | None, typer.Option(help="Names with commas between, in order; docs/cleaning.md.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file: filters and their parameters.")] = None,
    workers: Workers = None,
    text_key: TextKey = "text",
    id_key: IdKey = "id",
    errors: ErrorsOption = Errors.STRICT,
    restart: Restart = False,
) -> None:
    """Leave out documents that a quality filter finds fault with. The same command again goes on."""
    from data_tools.clean.filter import choose_filters, filter_documents
    from data_tools.units import ReadOptions

    read = ReadOptions(text_key, id_key, errors.value, whole_records=True)
    _clean(
        out,
        workers,
        lambda effort: filter_documents(inputs, out, read, choose_filters(filters, config), effort, restart),
    )


@app.command()
def inspect(
    dataset: DatasetArgument,
    document: Annotated[int | None, typer.Option(metavar="K", help="Document K (from 0), text and tokens.")] = None,
    everything: EverythingOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a dataset holds: counts, lengths, sources, and a document as text beside its tokens."""
    from data_tools.inspect import count, describe, describe_json, show
    from data_tools.progress import show_progress

    statistics = count(dataset, show_progress, everything=everything)
    if as_json:
        sys.stdout.buffer.write(describe_json(describe(dataset, document, statistics)))
    else:
        show(dataset, document, statistics)


@app.command()
def stats(
    dataset: DatasetArgument,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=local_path, help="Draw them, as .png, .svg or .pdf.")
    ] = None,
    everything: EverythingOption = False,
    as_json: JsonOption = False,
) -> None:
    """Lengths of documents, shares of sources, frequent tokens; as a picture too."""
    from data_tools.inspect import OutputConsole, count, describe_json, describe_statistics, show_statistics
    from data_tools.progress import show_progress
    from data_tools.stats import check_picture
    from data_tools.stats import plot as draw
    from megatrain.data import open_dataset

    if plot is not None:
        check_picture(plot)
    statistics = count(dataset, show_progress, everything=everything)
    described = describe_statistics(open_dataset(dataset), statistics)
    if plot is not None:
        draw(statistics, dataset, plot)
        typer.echo(f"The picture: {plot}", err=as_json)
    if as_json:
        sys.stdout.buffer.write(describe_json(described))
    else:
        show_statistics(OutputConsole(highlight=False, soft_wrap=True), described)


@app.command()
def verify(
    dataset: DatasetArgument,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Check so many record batches only; all by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which record batches a sample takes.")] = 0,
    workers: Workers = None,
) -> None:
    """Check every byte of a dataset: checksums, structure, and the digest computed anew."""
    from data_tools.progress import show_progress
    from data_tools.ranks import Ranks
    from data_tools.verify import Extent, verify_dataset

    extent = Extent(sample, seed, workers or Ranks().num_cores())
    opened, num_bytes = verify_dataset(dataset, extent, show_progress)
    whole = f"{opened.num_documents} documents, {opened.num_tokens} tokens"
    if sample is None:
        typer.echo(f"{dataset} is whole: {whole}.")
    else:
        typer.echo(f"{dataset}: {num_bytes / 1e6:.1f} MB of record batches, a sample (of {whole}), are whole.")


def _report(error: MegatrainError | OSError) -> int:
    """Say what is wrong, in one paragraph, and give the exit code for it."""
    if isinstance(error, MegatrainError):
        typer.echo(f"megatrain-data: {error}", err=True)
        return error.exit_code
    what = os.strerror(error.errno) if error.errno else str(error)  # pyarrow's own text of it says the same thrice
    typer.echo(f"megatrain-data: {error.filename or 'a file'}: {what.rstrip('.')}.", err=True)
    return EXIT_DATA


@contextmanager
def _ending_all(ranks: Ranks) -> Iterator[None]:
    """Where ranks wait for each other, an error of one ends them all."""
    try:
        yield
    except (MegatrainError, OSError) as error:
        if ranks.speak_mpi:
            ranks.abort(_report(error))
        raise


def main() -> None:
    """Run the command line; an error that a user can cause is one paragraph and its exit code."""
    try:
        app()
    except (MegatrainError, OSError) as error:
        sys.exit(_report(error))

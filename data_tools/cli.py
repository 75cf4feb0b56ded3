"""The command `megatrain-data`: text in, datasets out.

Only what parses the command line is imported here; each command imports what it needs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from data_tools.options import Running, Workers, image_options, reads_inputs, report_error, show_text, tell
from data_tools.outputs import disk_full_as_data_error, local_path
from megatrain.errors import ConfigError, MegatrainError
from megatrain.units import format_bytes

if TYPE_CHECKING:
    from data_tools.job import Effort


class Commands(TyperGroup):
    """The commands; one whose reader has gone (`| head`) ends in silence, as it would by the signal."""

    def invoke(self, ctx: Any) -> Any:
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


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files, folders, globs and fsspec URLs: .jsonl, .json, .csv, .tsv, .txt (also .gz, .zst, .bz2, .xz), "
        ".parquet, .arrow; other files as text where they are named.",
    ),
]
DatasetArgument = Annotated[
    str,
    typer.Argument(metavar="DATASET", help="The folder that `tokenize` or `images` wrote, or an address of a copy."),
]
CleanOut = Annotated[
    Path, typer.Option(metavar="DIR", parser=local_path, help="The folder to write to: .jsonl.zst, and .report in it.")
]
DatasetStage = Literal["encode", "plan", "shards", "manifest"]
CleanStage = Literal["read", "index", "list", "tally", "write", "publish"]
PairStage = Literal["read", "index", "sort", "compare", "join", "cluster"]
DedupStage = Literal[PairStage, CleanStage, "represent", "assign"]
SplitStage = Literal[PairStage, "count", "number", "write-train", "write-validation", "report", "publish"]
EverythingOption = Annotated[bool, typer.Option("--all", help="Count all of it, not a sample of 64 record batches.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]


@app.command()
def corpus(
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=local_path, help="The folder to write to.")],
) -> None:
    """A demo corpus of this Python installation's own sources and documentation; nothing is downloaded."""
    from data_tools.corpus import make_corpus

    with disk_full_as_data_error(out):
        written = make_corpus(out)
    for name, num_documents, num_bytes in written:
        show_text(f"{out / name}: {num_documents} documents, {format_bytes(num_bytes)} of text")


@app.command("train-tokenizer")
@reads_inputs()
def train_tokenizer_command(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(max=1 << 24, help="Tokens, the 256 bytes and <|endoftext|> included.")],
    out: Annotated[Path, typer.Option(metavar="FILE", parser=local_path, help="The tokenizer.json to write.")],
    special_token: Annotated[
        list[str] | None,
        typer.Option(help="A token that no text becomes, such as <|fim_prefix|>; may be given several times."),
    ] = None,
    pre_tokenizer: Annotated[
        Literal["gpt2", "llama3", "qwen2"],
        typer.Option(help="Whose pattern cuts text into words; qwen2: each digit by itself."),
    ] = "gpt2",
    split_digits: Annotated[
        bool, typer.Option("--split-digits", help="Each digit by itself, with any pattern.")
    ] = False,
    sample_bytes: Annotated[
        int | None, typer.Option(min=1, help="Train on about so much text, from all over the input; all unless given.")
    ] = None,
    read: Any = None,
) -> None:
    """Train a byte-level BPE tokenizer; no text is ever unknown to it."""
    from data_tools.progress import show_progress
    from data_tools.tokenizer import train_tokenizer

    with disk_full_as_data_error(out):
        size = train_tokenizer(
            *(inputs, vocab_size, out, read, special_token or [], tell),
            words=pre_tokenizer,
            split_digits=split_digits,
            sample_bytes=sample_bytes,
            progress=show_progress,
        )
    if size < vocab_size:
        tell(f"The text has no more pairs to merge: {size} tokens instead of {vocab_size}.")
    show_text(f"{out}: {size} tokens")


@app.command()
@reads_inputs(DatasetStage)
def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder with one.")],
    out: Annotated[Path, typer.Option(metavar="DATASET", parser=local_path, help="The dataset folder to write.")],
    shard_tokens: Annotated[int, typer.Option(min=1, max=1 << 48, help="About how many tokens a shard holds.")] = 2**28,
    eod_token: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    bos_token: Annotated[str | None, typer.Option(help="A token to begin each document with, such as <s>.")] = None,
    engine: Annotated[
        Literal["auto", "tokenizers", "fastokens"],
        typer.Option(help="auto: fastokens if it gives the ids of tokenizers."),
    ] = "auto",
    max_unknown: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The most of the text (a share) that may have no tokens.")
    ] = 0.01,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations: `messages`, by the tokenizer folder's chat template.")
    ] = False,
    messages_key: Annotated[
        str | None, typer.Option(help="--chat: the key of the messages; `messages` unless given.")
    ] = None,
    tools_key: Annotated[str | None, typer.Option(help="--chat: the key of tools; `tools` unless given.")] = None,
    loss: Annotated[
        Literal["all", "last"] | None, typer.Option(help="--chat: score all answers (if not given), or the last.")
    ] = None,
    train_on_roles: Annotated[
        list[str] | None, typer.Option(help="--chat: whose messages are answers; repeatable; `assistant` unless given.")
    ] = None,
    chat_date: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="--chat: the day that templates are told.")
    ] = None,
    prompt_key: Annotated[str | None, typer.Option(help="The key of a prompt; with --answer-key.")] = None,
    answer_key: Annotated[str | None, typer.Option(help="The key of its answer, which alone is scored.")] = None,
    source_key: Annotated[str | None, typer.Option(help="The key of what an encoder reads; with --target-key.")] = None,
    target_key: Annotated[str | None, typer.Option(help="The key of its target, which alone is scored.")] = None,
    target_tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json of targets, where they have another one than sources.")
    ] = None,
    label_key: Annotated[str | None, typer.Option(help="The key of a text's label, to classify texts.")] = None,
    text_pair_key: Annotated[
        str | None, typer.Option(help="--label-key: the key of a second text, which the label is of as well.")
    ] = None,
    label_names: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="--label-key: the labels in order, one a line; sorted unless given."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Answers that end behind so many tokens of a document are left out.")
    ] = None,
    read: Any = None,
    running: Any = None,
) -> None:
    """Turn text into a dataset. The same command again goes on where it was stopped.

    Under mpirun, or srun with an MPI, the ranks are the workers; a task of a SLURM array does its share.
    """
    from data_tools.conversations import Answers
    from data_tools.progress import show_progress
    from data_tools.supervised import describe_counts, describe_scored
    from data_tools.tokenize import Effort, TokenizeOptions
    from data_tools.tokenize import tokenize as run

    of_chat = (chat, messages_key, tools_key, loss, train_on_roles or (), chat_date)
    of_two = (prompt_key, answer_key, source_key, target_key, target_tokenizer, max_tokens)
    answers = Answers(*of_chat, *of_two, label_key, text_pair_key, label_names)
    read, supervision = answers.read(read), answers.supervision(tokenizer.expanduser(), eod_token, bos_token)
    options = TokenizeOptions(read, eod_token, bos_token, shard_tokens, supervision)
    with running.place() as place:
        if place is None:
            return
        settings = (place.pool.count, engine, show_progress, lambda text: tell(f"Warning: {text}"))
        effort = Effort(*settings, max_unknown=max_unknown, say=tell, place=place, stage=running.stage)
        with disk_full_as_data_error(out):
            manifest = run(inputs, tokenizer.expanduser(), out, options, effort, restart=running.restart)
    if manifest is None:
        return
    show_text(
        f"{out}: {manifest.num_documents} documents, {manifest.num_tokens} tokens ({manifest.dtype}), "
        f"{format_bytes(manifest.text_bytes)} of text, {manifest.num_shards} shards, "
        f"{manifest.num_empty_documents} empty documents left out, digest {manifest.digest}"
    )
    if manifest.unknown and manifest.unknown.characters:
        tell(f"Warning: the tokenizer has no tokens for {manifest.unknown}")
    if manifest.num_scored is not None:
        show_text(describe_scored(manifest))
    if manifest.label_names is not None:
        show_text(f"{len(manifest.label_names)} labels. Texts: {describe_counts(manifest.examples or {})}.")
    if manifest.num_skipped:
        tell(f"{manifest.num_skipped} rows were left out; {out / 'skipped.jsonl'} lists them.")


@app.command()
@reads_inputs(DatasetStage, image_options)
def images(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, globs and fsspec URLs: .png, .jpg and others in a folder for each label; .parquet; "
            "IDX files.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DATASET", parser=local_path, help="The dataset folder to write.")],
    label_names: Annotated[
        str | None, typer.Option(metavar="FILE", help="The names of the labels, one a line; found unless given.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, max=1 << 48, help="About how many bytes a shard holds.")] = 2**28,
    read: Any = None,
    running: Any = None,
) -> None:
    """Pack images and their labels into a dataset. The same command again goes on where it was stopped."""
    from data_tools.images import ImageOptions, pack_images
    from data_tools.inspect_images import describe_labels

    options = ImageOptions(read, label_names, shard_bytes)
    with _effort(out, running) as effort:
        manifest = None if effort is None else pack_images(inputs, out, options, effort, restart=running.restart)
    if manifest is None:
        return
    show_text(
        f"{out}: {manifest.num_images} images, {format_bytes(manifest.num_bytes)}, {manifest.num_shards} shards, "
        f"{describe_labels(manifest)}, digest {manifest.digest}"
    )
    if manifest.num_skipped:
        tell(f"{manifest.num_skipped} images were left out; {out / 'skipped.jsonl'} lists them.")


@app.command()
@reads_inputs(DedupStage)
def dedup(
    inputs: Inputs,
    out: CleanOut,
    method: Annotated[
        Literal["exact", "minhash"], typer.Option(help="exact: the same characters; minhash: nearly.")
    ] = "exact",
    threshold: Annotated[
        float | None, typer.Option(help="minhash: Jaccard index of shingles from which on; 0.8 unless given.")
    ] = None,
    num_permutations: Annotated[
        int | None, typer.Option(help="minhash: size of a signature; 256 unless given.")
    ] = None,
    ngram: Annotated[int | None, typer.Option(help="minhash: words in a shingle; 5 unless given.")] = None,
    cluster_by: Annotated[
        Literal["connected", "representative"] | None,
        typer.Option(help="minhash: one of each connected component stays, or also what is unlike that one."),
    ] = None,
    read: Any = None,
    running: Any = None,
) -> None:
    """Leave out documents that are the same, or nearly, as an earlier one. The same command again goes on."""
    from data_tools.clean.dedup import DedupOptions
    from data_tools.clean.dedup import dedup as run

    all_options: dict[str, Any] = {"threshold": threshold, "num_permutations": num_permutations, "ngram": ngram}
    all_options |= {"cluster_by": cluster_by}
    given = {name: value for name, value in all_options.items() if value is not None}
    if given and method != "minhash":
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{named} would do nothing: it is for near duplicates, --method minhash.")
    options = DedupOptions(replace(read, whole_records=True), method, **given)
    _clean(out, running, lambda effort: run(inputs, out, options, effort, running.restart))


@contextlib.contextmanager
def _effort(out: Path, running: Running) -> Iterator[Effort | None]:
    """What the work on ``out`` is done by; None where this process is a worker, whose work is done by then."""
    from data_tools.job import Effort
    from data_tools.progress import show_progress

    with running.place() as place, disk_full_as_data_error(out):
        if place is None:
            yield None
        else:
            yield Effort(place.pool.count, show_progress, say=tell, place=place, stage=running.stage)


def _clean(
    out: Path,
    running: Running,
    work: Callable[[Effort], dict[str, Any] | None],
    show: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Do the work of a command that cleans, or of a worker; show its report (None: in full)."""
    from data_tools.clean.report import render

    with _effort(out, running) as effort:
        report = None if effort is None else work(effort)
    if report is not None:
        dropped = f"This report, and the list of what was dropped: {out / '.report'}"
        show_text(show(report) if show else f"{render(report)}\n{dropped}")


@app.command("filter")
@reads_inputs(CleanStage)
def filter_command(
    inputs: Inputs,
    out: CleanOut,
    filters: Annotated[str | None, typer.Option(help="Names with commas between, in order; docs/cleaning.md.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file: filters and their parameters.")] = None,
    read: Any = None,
    running: Any = None,
) -> None:
    """Leave out documents that a quality filter finds fault with. The same command again goes on."""
    from data_tools.clean.filter import choose_filters, filter_documents

    chosen = choose_filters(filters, config and config.expanduser())
    read = replace(read, whole_records=True)
    _clean(out, running, lambda effort: filter_documents(inputs, out, read, chosen, effort, running.restart))


@app.command()
@reads_inputs(SplitStage)
def split(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Texts, as for `tokenize`; or one tokenized DATASET.")
    ],
    validation: Annotated[
        str, typer.Option(metavar="SHARE", help="About which share of the documents to hold out: 0.1%, or 0.001.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=local_path, help="The folder to write train and validation to.")
    ],
    method: Annotated[
        Literal["exact", "minhash"],
        typer.Option(help="What stays on one side: minhash: near duplicates; exact: the same characters."),
    ] = "minhash",
    threshold: Annotated[
        float | None, typer.Option(help="minhash: Jaccard index of shingles from which on; 0.8 unless given.")
    ] = None,
    read: Any = None,
    running: Any = None,
) -> None:
    """Hold out documents for validation, by a hash of each; near duplicates stay on one side.

    The same command again goes on.
    """
    from data_tools.clean.dedup import DedupOptions
    from data_tools.clean.split import parse_share, render
    from data_tools.clean.split import split as run

    held_out = parse_share(validation)
    if threshold is not None and method != "minhash":
        raise ConfigError("--threshold would do nothing: it is for near duplicates, --method minhash.")
    options = DedupOptions(replace(read, whole_records=True), method, threshold or DedupOptions.threshold)
    work = partial(run, inputs, held_out, out, options)
    _clean(out, running, lambda effort: work(effort, running.restart), partial(render, out=out))


@app.command()
def inspect(
    dataset: DatasetArgument,
    document: Annotated[
        int | None, typer.Option(metavar="K", help="Document K (from 0), text and tokens; or image K.")
    ] = None,
    everything: EverythingOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a dataset holds: counts, lengths, sources, and a document as text beside its tokens.

    Of images: labels and sizes.
    """
    from data_tools.inspect import count, describe, describe_json, describe_statistics, show
    from data_tools.inspect_images import describe_images, show_images
    from data_tools.progress import show_progress
    from megatrain.data.images import ImageDataset, open_either

    opened = open_either(dataset)
    if isinstance(opened, ImageDataset):
        described = describe_images(opened, document, show_progress, everything=everything)
        sys.stdout.buffer.write(describe_json(described)) if as_json else show_images(described)
        return
    counted = describe_statistics(opened, count(opened, show_progress, everything=everything))
    if as_json:
        sys.stdout.buffer.write(describe_json({**describe(opened, document), **counted}))
    else:
        show(opened, document, counted)


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
    from data_tools.inspect import (
        OutputConsole,
        check_picture,
        count,
        describe_json,
        describe_statistics,
        show_statistics,
    )
    from data_tools.inspect import plot as draw
    from data_tools.progress import show_progress
    from megatrain.data import open_dataset

    if plot is not None:
        check_picture(plot)
    opened = open_dataset(dataset)
    statistics = count(opened, show_progress, everything=everything)
    described = describe_statistics(opened, statistics)
    if plot is not None:
        draw(statistics, described, dataset, plot)
        show_text(f"The picture: {plot}", err=as_json)
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
    from data_tools.verify import verify_dataset

    num_workers = workers or Ranks().num_cores()
    opened, num_bytes = verify_dataset(dataset, show_progress, sample=sample, seed=seed, num_workers=num_workers)
    if sample is None:
        show_text(f"{dataset} is whole: {opened.contents}.")
    else:
        show_text(
            f"{dataset}: {format_bytes(num_bytes)} of record batches, a sample (of {opened.contents}), are whole."
        )


def main() -> None:
    try:
        app()
    except (MegatrainError, OSError) as error:
        sys.exit(report_error(error))

"""The commands on a model: generate, eval, export, import."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatrain.cli.options import AsJson, CheckpointPath, place_of, print_json, run_on_ranks
from megatrain.errors import ConfigError, DataError
from megatrain.terminal import printable

Best = Annotated[bool, typer.Option("--best", help="Of a run folder, the checkpoint with the lowest validation loss.")]
Ema = Annotated[bool, typer.Option("--ema", help="With the averaged weights (optimizer.ema_decay).")]


def generate(
    checkpoint: CheckpointPath,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file with a prompt a line; where its name ends in .jsonl, with {"prompt": ...} a line.'),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: the file for what comes, as JSON lines.")] = None,
    is_chat: Annotated[
        bool, typer.Option("--chat", help="A conversation by the model's chat template; with --prompt, one turn of it.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that sum to this; above 0.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many of the likeliest tokens.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that are in the text already become less likely.")
    ] = 1.0,
    num_beams: Annotated[
        int, typer.Option(min=1, help="Above 1: beam search for the likeliest text, in place of sampling.")
    ] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beam search: above 0, longer texts gain.")] = 1.0,
    early_stopping: Annotated[
        Literal["false", "true", "never"],
        typer.Option(help="Of beam search: whether it ends with as many texts as beams."),
    ] = "false",
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends what is generated; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same text.")] = 0,
    procs: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine that share the model, where it is too large for one."),
    ] = None,
    tensor: Annotated[
        int | None, typer.Option(min=1, help="The same as --procs: all of these ranks are tensor ranks.")
    ] = None,
    best: Best = False,
    ema: Ema = False,
) -> None:
    """Continue a prompt, or each prompt in a file, with a trained model.

    Under srun, mpirun or torchrun, the ranks that these start share the model.
    """
    from megatrain.distributed.bootstrap import read_rank

    if (prompt is None) == (prompts is None) and not (is_chat and prompts is None):
        raise ConfigError("Give --prompt TEXT, or --prompts FILE with --out FILE, or --chat.")
    if is_chat and prompts is not None:
        raise ConfigError("--chat asks for one turn after the other: leave out --prompts.")
    if system is not None and not is_chat:
        raise ConfigError("--system belongs to --chat.")
    if (prompts is None) != (out is None):
        raise ConfigError("--prompts FILE and --out FILE belong together.")
    if "" in (stop or ()):
        raise ConfigError("--stop is an empty text, which ends nothing: give a text, or leave it out.")
    _refuse_no_folder(out)
    rank = read_rank()
    num_ranks = rank.world_size if rank.world_size > 1 else procs or tensor or 1
    if is_chat and num_ranks > 1 and prompt is None:
        raise ConfigError("A conversation on several ranks needs its turn from --prompt.")
    if tensor not in (None, num_ranks):
        raise ConfigError(
            f"--tensor {tensor}: generate cuts the model among all of its ranks, and there are {num_ranks}. Give "
            f"--tensor {num_ranks}, or leave it out."
        )
    if rank.world_size < num_ranks:
        raise typer.Exit(run_on_ranks(num_ranks))
    from megatrain.atomic import commit_bytes
    from megatrain.distributed.binding import bind
    from megatrain.inference.writer import TextSettings, chat, generate_file, generate_text
    from megatrain.model.beams import BeamSearch
    from megatrain.model.generate import Sampling

    bind(rank)
    ends_early: bool | Literal["never"] = "never" if early_stopping == "never" else early_stopping == "true"
    settings = TextSettings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p if top_p != 1.0 else None, repetition_penalty),
        seed=seed,
        stops=stop or (),
        beams=BeamSearch(num_beams, length_penalty, ends_early) if num_beams > 1 else None,
    )
    is_first, place = rank.rank == 0, place_of(checkpoint, best)
    screen = _Screen(is_first)
    warn = screen.warnings.append
    if prompts is not None and out is not None:
        show_progress = sys.stderr.isatty() and is_first
        lines = generate_file(place, prompts, settings, warn=warn, rank=rank, ema=ema, show_progress=show_progress)
        screen.warn()
        if is_first:
            commit_bytes(out, lines)
    elif is_chat:
        turns, has_answered = _asked_turns() if prompt is None else [prompt], False
        for answer in chat(place, turns, settings, system=system, warn=warn, rank=rank, ema=ema):
            has_answered = True
            screen.show(answer)
        if prompt is not None and not has_answered:
            raise DataError(" ".join(screen.warnings))
        screen.warn()
    else:
        screen.show(generate_text(place, prompt or "", settings, warn=warn, rank=rank, ema=ema))


def _refuse_no_folder(out: Path | None) -> None:
    """Before the work is done: raise ConfigError where the folder of the file ``out`` is missing."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        problem = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ConfigError(f"--out {out}: {problem}. Name a file in a folder that exists.")


class _Screen:
    """What rank 0 shows: pieces of texts as they come, and warnings before the next of them. The other ranks do their
    part of the work."""

    def __init__(self, is_shown: bool) -> None:
        self.warnings: list[str] = []
        self._is_shown = is_shown

    def show(self, texts: Iterator[str]) -> None:
        if not self._is_shown:
            collections.deque(texts, maxlen=0)
            return
        for text in texts:
            self.warn()
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.warn()

    def warn(self) -> None:
        while self.warnings and self._is_shown:
            typer.echo(printable(f"Warning: {self.warnings.pop(0)}"), err=True)


def _asked_turns() -> Iterator[str]:
    """What a user types, line by line, up to the end of the input."""
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def evaluate(
    checkpoint: CheckpointPath,
    data: Annotated[
        str | None, typer.Option(help="A dataset folder or address, tokenized with the checkpoint's tokenizer.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="A YAML file of few-shot tasks (docs/evaluation.md).")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question. Default: what each task says.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which solved examples are chosen.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="With --tasks: ask by the model's chat template.")] = False,
    out: Annotated[Path | None, typer.Option(help="With --tasks: a file for each answer, as JSON lines.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="With --tasks: what --out wrote for another model, to compare with by paired bootstrap."),
    ] = None,
    training_data: Annotated[
        list[str] | None,
        typer.Option(help="A dataset to look for the tasks' examples in, by runs of 13 words; may be repeated."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="With --data: tokens in a window. Default: data.seq_len of the run.")
    ] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine that share the work, each with a GPU or cores.")
    ] = None,
    tensor: Annotated[
        int, typer.Option(min=1, help="Ranks that share one copy of the model, where it is too large for one.")
    ] = 1,
    best: Best = False,
    ema: Ema = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint: loss, perplexity and bits per byte on a dataset, or scores on tasks.

    Under srun, mpirun or torchrun, the ranks that these start share the work.
    """
    from megatrain.distributed.bootstrap import read_rank

    if data is None and tasks is None:
        raise ConfigError("Give --data DATASET, --tasks FILE, or both.")
    if tasks is None and (shots is not None or chat or out or baseline or training_data):
        raise ConfigError("--shots, --chat, --out, --baseline and --training-data belong to --tasks FILE.")
    if data is None and seq_len is not None:
        raise ConfigError("--seq-len belongs to --data DATASET.")
    _refuse_no_folder(out)
    rank = read_rank()
    if rank.world_size == 1 and (procs or tensor) > 1:
        raise typer.Exit(run_on_ranks(procs or tensor))
    from megatrain.distributed.binding import bind

    bind(rank)
    is_first, place = rank.rank == 0, place_of(checkpoint, best)
    show_progress = sys.stderr.isatty() and is_first
    figures: dict[str, Any] = {}
    if data is not None:
        from megatrain.train.evaluation import evaluate_checkpoint

        figures = evaluate_checkpoint(
            place, data, seq_len, show_progress=show_progress, rank=rank, tensor=tensor, ema=ema
        )
    if is_first and not as_json:
        for name, value in figures.items():
            typer.echo(f"{name:14} {value:,.4f}" if isinstance(value, float) else f"{name:14} {value:,}")
    if tasks is not None:
        from megatrain.tasks.evaluation import evaluate_tasks
        from megatrain.tasks.report import show_results, to_json

        results = evaluate_tasks(
            place,
            tasks,
            shots,
            seed=seed,
            chat=chat,
            out=out,
            baseline=baseline,
            rank=rank,
            tensor=tensor,
            ema=ema,
            training_data=training_data or (),
            show_progress=show_progress,
        )
        figures |= to_json(results)
        if is_first and not as_json:
            show_results(results)
    if is_first and as_json:
        print_json(figures)


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Of LoRA: base and adapters as one model.")] = False,
    best: Best = False,
    ema: Ema = False,
) -> None:
    """Write a checkpoint as a folder that Hugging Face transformers loads; LoRA's adapters as one that peft loads."""
    from megatrain.train.convert import export_checkpoint

    exported = export_checkpoint(place_of(checkpoint, best), out, merge=merge, ema=ema)
    typer.echo(f"{out} is {exported.source} for {exported.reader}.")
    for note in exported.notes:
        typer.echo(note)


def import_command(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and safetensors, or of peft's adapters.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to make; it must not exist yet.")],
    base: Annotated[str | None, typer.Option(help="Of peft's adapters: the checkpoint that they adapt.")] = None,
) -> None:
    """Make a checkpoint from a Hugging Face folder, for run.init_from, eval and generate."""
    from megatrain.train.convert import import_folder

    imported = import_folder(folder, out, None if base is None else place_of(base))
    typer.echo(f"{out} holds {folder}: {imported.num_parameters:,} parameters.")
    for note in imported.notes:
        typer.echo(note)
    typer.echo(f"Start from it with run.init_from={out} and, in the config, model: from_checkpoint.")

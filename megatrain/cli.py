"""The command `megatrain`: parse, call, turn errors into exit codes.

Only what parses the command line is imported here; each command imports what it needs, so that --help is quick and a
wrong config fails before torch is there.
"""

from __future__ import annotations

import collections
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatrain.errors import EXIT_BUG, EXIT_CHECKPOINT, ConfigError, DataError, MegatrainError
from megatrain.terminal import printable

if TYPE_CHECKING:
    from megatrain.checkpoint.location import Location
    from megatrain.config import RunConfig
    from megatrain.data.epochs import Length

app = typer.Typer(
    help="Train language models: check and plan a config, train it, compare runs, use checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
checkpoint_app = typer.Typer(
    help="List, inspect, verify, rewind and average the checkpoints of a run.", no_args_is_help=True
)
app.add_typer(checkpoint_app, name="checkpoint")

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML config, or the name of a recipe: see `megatrain recipes`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set single keys, such as train.steps=10.")
]
CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint folder, or a run folder (its newest good checkpoint), or the URL of either.",
    ),
]
Best = Annotated[bool, typer.Option("--best", help="Of a run folder, the checkpoint with the lowest validation loss.")]
Ema = Annotated[bool, typer.Option("--ema", help="With the averaged weights (optimizer.ema_decay).")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the URL of its checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, and nothing else.")]


Nodes = Annotated[
    int | None, typer.Option(min=1, help="Number of nodes. Default: 1, or as many as one copy of the model needs.")
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks on each node, one for each GPU. Default: 8, or without --nodes as few as needed."),
]

Procs = Annotated[int | None, typer.Option(min=1, help="Ranks in all, where there are no GPUs.")]


def _refuse_ranks_twice(procs: int | None, nodes: int | None, gpus_per_node: int | None) -> None:
    if procs is not None and (nodes is not None or gpus_per_node is not None):
        raise ConfigError("--procs is the number of all ranks: give it alone, or --nodes with --gpus-per-node.")


def _finite(value: float | None) -> float | None:
    """Refuse the numbers that no minimum refuses: nan and inf."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _number(help: str, min: float = 0.001, max: float | None = None) -> Any:
    return typer.Option(help=help, min=min, max=max, callback=_finite)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    procs: Procs = None,
) -> None:
    """Check a config and its layout, and list everything that is wrong. Needs no torch and no data.

    The datasets and the checkpoint in run.init_from are checked too, where they are on this machine.
    """
    from megatrain.checkpoint.transformers_config import not_in_transformers
    from megatrain.plan import rules
    from megatrain.plan.cluster import find_nodes
    from megatrain.plan.this_machine import CPU, cpu_computes_bf16, device_here
    from megatrain.train import preview

    loaded = _load(config, overrides)
    _refuse_ranks_twice(procs, nodes, gpus_per_node)
    world_size = procs or math.prod(find_nodes(loaded, nodes, gpus_per_node))
    rules.check(loaded, world_size)
    notes = [*preview.check_origin(loaded), *not_in_transformers(loaded.model), *preview.check_data(config, loaded)]
    notes += [*preview.check_tasks(loaded), *preview.check_trackers(loaded)]
    length, data = preview.length(loaded), rules.data_degree(loaded, world_size)
    at_most = "" if isinstance(loaded.train.global_batch_size, int) else "up to "
    typer.echo(
        f"{config} is right on {world_size} rank(s): data {data} x tensor {loaded.parallel.tensor} x pipeline "
        f"{loaded.parallel.pipeline}, {at_most}{rules.num_micro_batches(loaded, world_size)} micro-batch(es) a step."
    )
    for note in notes:
        typer.echo(note)
    _show_length(loaded, length)
    is_here = nodes is None and gpus_per_node is None and device_here() == CPU
    if is_here and loaded.train.precision == "bf16" and not cpu_computes_bf16():
        typer.echo(
            "This machine's CPU has no units for bf16, and takes some hundred times as long: to train here, set "
            "train.precision=fp32."
        )


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The recipe to print. Default: a list of all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Copy it to this file, which must not exist yet.")] = None,
) -> None:
    """List the configs that come with megatrain, or print one. Every command takes a recipe's name as CONFIG."""
    from megatrain.config import recipes

    if name is None:
        if out is not None:
            raise ConfigError(f"--out {out}: name the recipe to copy there; `megatrain recipes` lists them.")
        width = max(map(len, recipes.names()))
        for each in recipes.names():
            typer.echo(f"{each:{width}}  {recipes.summary(each)}")
    elif out is None:
        sys.stdout.write(recipes.text(name))
    else:
        _write_new(out, recipes.text(name))
        typer.echo(f"{out} is a copy of {name}.")


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    procs: Procs = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="a100, h100, h200, b200, mi300x, l40s, ..., or cpu: this machine's, measured. Default: what this "
            "machine has; with --nodes or --gpus-per-node: h100."
        ),
    ] = None,
    network_gbits: Annotated[float, _number("Network of each GPU to other nodes, Gbit/s one way.")] = 400.0,
    efficiency: Annotated[
        float | None,
        _number(
            "Share of its peak FLOP/s at which a GPU computes, where it was measured. Default: worked out from the "
            "operations of each layer and their shapes.",
            max=1.0,
        ),
    ] = None,
    mtbf_hours_per_node: Annotated[float, _number("Mean hours between failures of one node.")] = 6300.0,
    checkpoint_seconds: Annotated[
        float | None,
        _number(
            "Seconds that a save stops training. Default: estimated from the copy to CPU memory, and from the "
            "writing where checkpoint.background is false.",
            min=0.0,
        ),
    ] = None,
    write_gbytes: Annotated[
        float, _number("GB/s that a node writes of a checkpoint: an assumption, better measured.")
    ] = 2.0,
    restart_seconds: Annotated[float, _number("Seconds from a failure until training goes on.", min=0.0)] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run needs: memory of each rank, time, saves. Needs no torch, and no data if vocab_size is set."""
    from megatrain.plan.cluster import Cluster, find_nodes
    from megatrain.plan.run_plan import Interruptions, make_plan
    from megatrain.plan.table import show
    from megatrain.plan.this_machine import device_here
    from megatrain.train import preview

    _refuse_ranks_twice(procs, nodes, gpus_per_node)
    loaded = preview.with_vocabulary(_load(config, overrides))
    if device is None:
        device = device_here() if nodes is None and gpus_per_node is None else "h100"
    nodes, gpus_per_node = find_nodes(loaded, nodes, gpus_per_node) if procs is None else (1, procs)
    cluster = Cluster.of(nodes, gpus_per_node, device, network_gbits, efficiency)
    interruptions = Interruptions(mtbf_hours_per_node, restart_seconds, checkpoint_seconds, write_gbytes * 1e9)
    length = preview.length(loaded)
    planned = make_plan(preview.with_steps(loaded, length), cluster, interruptions)
    if as_json:
        _print_json({**planned.to_json(), "epochs": [each._asdict() for each in length.epochs] if length else []})
    else:
        show(planned)
        _show_length(loaded, length)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine. Default: one for each GPU, or one.")
    ] = None,
) -> None:
    """Train on this machine. The same command again resumes from the newest good checkpoint.

    For several machines, see `megatrain-launch`. Any launcher starts the ranks as well: `deepspeed --module
    megatrain.train CONFIG`, `torchrun -m megatrain.train CONFIG`, `srun` or `mpirun python -m megatrain.train CONFIG`.
    """
    from megatrain.checkpoint.lock import folders_of, refuse_if_locked
    from megatrain.distributed.bootstrap import job_identity, visible_gpus
    from megatrain.distributed.supervisor import launch
    from megatrain.plan import rules
    from megatrain.train import preview

    loaded = _load(config, overrides)
    num_ranks = _num_local_ranks(procs)
    rules.check(loaded, num_ranks)
    preview.check_trackers(loaded, must_exist=True)
    preview.check_tasks(loaded, must_exist=True)
    _check_data(config, loaded)
    preview.check_origin(preview.with_vocabulary(loaded), must_exist=True)
    run_dir = Path(loaded.run.dir)
    for folder in folders_of(run_dir, loaded.checkpoint.dir):
        refuse_if_locked(folder, job_identity())
    raise typer.Exit(launch(config, overrides or (), num_ranks, run_dir, has_gpu=bool(visible_gpus())))


@app.command("profile")
def profile_command(
    config: Config,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine. Default: one for each GPU, or one.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to profile, after some to warm up.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the traces; it must not hold a profile. Default: RUN/profile.")
    ] = None,
) -> None:
    """Show where the time and the memory of a step go, by part and by kernel, and write a trace for Perfetto.

    Trains some steps from initial weights, and changes nothing of the run. Under srun, mpirun or torchrun, the ranks
    that these start are profiled. The trace of each pipeline stage's first rank is rank-*.json.gz, which
    https://ui.perfetto.dev opens.
    """
    from megatrain.distributed.bootstrap import export_rank, read_rank
    from megatrain.plan import rules
    from megatrain.train import preview

    loaded, rank = _load(config, overrides), read_rank()
    out = out or Path(loaded.run.dir) / "profile"
    is_started = rank.launcher != "none"
    num_ranks = rank.world_size if is_started else _num_local_ranks(procs)
    rules.check(loaded, num_ranks)
    preview.check_profile_folder(out)
    if not is_started:
        _check_data(config, loaded)
        raise typer.Exit(_run_on_ranks(num_ranks))
    from megatrain.distributed.binding import bind

    bind(rank)
    export_rank(rank)  # before torch is loaded
    from megatrain.observe.profile import show
    from megatrain.train.profile import profile

    found = profile(loaded, rank, steps, out)
    if rank.rank == 0:
        show(found)
        typer.echo(f"\ntrace    {out / found[0].trace}: open it in https://ui.perfetto.dev")


@app.command()
def sweep(
    config: Config,
    overrides: Overrides = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each run. Default: one for each GPU, or one.")
    ] = None,
    point: Annotated[int | None, typer.Option(min=0, help="Train only the run of this number, counted from 0.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Print a batch script: a SLURM array of all runs.")] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="--KEY=VALUE", help="With --slurm: an option of sbatch. Repeatable.")
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="With --slurm: submit the script.")] = False,
) -> None:
    """Train a run for each combination of values, such as optimizer.lr=1e-3,3e-3, one after the other.

    Each run has a folder of its own in run.dir, named after its values. The same command again goes on where it
    stopped: a run that has ended is not started again.
    """
    from megatrain.experiments import sweep

    points = sweep.points(config, overrides or ())
    if slurm:
        raise typer.Exit(sweep.array(config, overrides or (), len(points), procs, sbatch or (), submit=submit))
    if sbatch or submit:
        raise ConfigError("--sbatch and --submit are for --slurm.")
    if point is not None and point >= len(points):
        raise ConfigError(f"--point {point}: the sweep has {len(points)} runs, counted from 0.")
    raise typer.Exit(sweep.run(config, points if point is None else [points[point]], procs, typer.echo))


@app.command()
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
    if tensor not in (None, num_ranks):
        raise ConfigError(
            f"--tensor {tensor}: generate cuts the model among all of its ranks, and there are {num_ranks}. Give "
            f"--tensor {num_ranks}, or leave it out."
        )
    if rank.world_size < num_ranks:
        raise typer.Exit(_run_on_ranks(num_ranks))
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
    is_first, warnings, place = rank.rank == 0, list[str](), _place(checkpoint, best)

    def warn() -> None:
        while warnings and is_first:
            typer.echo(printable(f"Warning: {warnings.pop(0)}"), err=True)

    if prompts is not None and out is not None:
        show_progress = sys.stderr.isatty() and is_first
        lines = generate_file(
            place, prompts, settings, warn=warnings.append, rank=rank, ema=ema, show_progress=show_progress
        )
        warn()
        if is_first:
            commit_bytes(out, lines)
        return
    if is_chat:
        if num_ranks > 1 and prompt is None:
            raise ConfigError("A conversation on several ranks needs its turn from --prompt.")
        turns, has_answered = _asked_turns() if prompt is None else [prompt], False
        for answer in chat(place, turns, settings, system=system, warn=warnings.append, rank=rank, ema=ema):
            has_answered = True
            _show(answer if is_first else iter(collections.deque(answer, maxlen=0)), warn)
        if prompt is not None and not has_answered:
            raise DataError(" ".join(warnings))
        warn()
        return
    texts = generate_text(place, prompt or "", settings, warn=warnings.append, rank=rank, ema=ema)
    if not is_first:
        collections.deque(texts, maxlen=0)  # its part of the work; rank 0 shows the text
        return
    _show(texts, warn)


def _refuse_no_folder(out: Path | None) -> None:
    """Before the work is done: raise ConfigError where the folder of the file ``out`` is missing."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        problem = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ConfigError(f"--out {out}: {problem}. Name a file in a folder that exists.")


def _show(texts: Iterator[str], warn: Callable[[], None]) -> None:
    """Print pieces of a text as they come, and warnings before the next of them."""
    for text in texts:
        warn()
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    warn()


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


@app.command("eval")
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
        raise typer.Exit(_run_on_ranks(procs or tensor))
    from megatrain.distributed.binding import bind

    bind(rank)
    is_first, place = rank.rank == 0, _place(checkpoint, best)
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
        _print_json(figures)


@app.command()
def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Of LoRA: base and adapters as one model.")] = False,
    best: Best = False,
    ema: Ema = False,
) -> None:
    """Write a checkpoint as a folder that Hugging Face transformers loads; LoRA's adapters as one that peft loads."""
    from megatrain.train.convert import export_checkpoint

    exported = export_checkpoint(_place(checkpoint, best), out, merge=merge, ema=ema)
    typer.echo(f"{out} is {exported.source} for {exported.reader}.")
    for note in exported.notes:
        typer.echo(note)


@app.command("import")
def import_command(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="A folder with config.json and safetensors, or of peft's adapters.")
    ],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to make; it must not exist yet.")],
    base: Annotated[str | None, typer.Option(help="Of peft's adapters: the checkpoint that they adapt.")] = None,
) -> None:
    """Make a checkpoint from a Hugging Face folder, for run.init_from, eval and generate."""
    from megatrain.train.convert import import_folder

    imported = import_folder(folder, out, None if base is None else _place(base))
    typer.echo(f"{out} holds {folder}: {imported.num_parameters:,} parameters.")
    for note in imported.notes:
        typer.echo(note)
    typer.echo(f"Start from it with run.init_from={out} and, in the config, model: from_checkpoint.")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run folder, or several.")],
    out: Annotated[Path, typer.Option(help="The file to write: .html; of one run also .png, .svg or .pdf.")] = Path(
        "report.html"
    ),
) -> None:
    """Write a page about a run: loss, throughput, gradient norm, use of time, resumes.

    About several runs: their curves in one chart, what differs in their configs, the best value of each.
    """
    if len(runs) == 1:
        from megatrain.observe.report import write_report

        write_report(runs[0], out)
    else:
        from megatrain.experiments.comparison import write_comparison

        write_comparison(runs, out)
    typer.echo(f"{out} shows {', '.join(map(str, runs))}.")


class RunOrder(str, Enum):
    """What `runs` sorts by."""

    VALIDATION = "validation_loss"
    LOSS = "loss"
    STEP = "step"
    RUN = "run"


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with run folders in it, at any depth.")],
    sort: Annotated[
        RunOrder, typer.Option(help="Best first; step: the farthest first; run: by name.")
    ] = RunOrder.VALIDATION,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder: state, step, loss, best validation loss, and the config keys that differ."""
    from megatrain.experiments.runs import show, summarize

    found = summarize(folder, sort.value)
    if as_json:
        _print_json([run._asdict() for run in found])
    else:
        show(found)


@checkpoint_app.command("list")
def list_checkpoints(run: RunPlace, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first: tokens trained on, validation loss, good or damaged."""
    from megatrain.checkpoint.inspection import list_checkpoints

    rows = list_checkpoints(_place(run))
    if as_json:
        _print_json([row.to_json() for row in rows])
        return
    for row in rows:
        tokens, loss = (
            ("?", None) if row.manifest is None else (f"{row.manifest.tokens:,}", row.manifest.validation_loss)
        )
        validation = "" if loss is None else f"validation loss {loss:.4f}"
        state = "good" if row.good else f"NOT GOOD: {row.problem}"
        typer.echo(f"step {row.step:>8}  {tokens:>15} tokens  {validation:<22}  {row.path}  {state}")


@checkpoint_app.command("inspect")
def inspect_checkpoint(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: step, tokens, layout, files."""
    from megatrain.checkpoint.inspection import describe

    figures = describe(_place(path))
    if as_json:
        _print_json(figures)
        return
    for name in ("path", "step", "tokens", "parameters", "created", "layout", "versions"):
        typer.echo(f"{name:11} {figures[name]}")
    if (base := figures["base"]) is not None:
        typer.echo(f"{'adapters of':11} {base['path']}, {base['parameters']:,} parameters, digest {base['digest']}")
    if (chat := figures["chat"]) is not None:
        day = f", told {chat['date']}" if chat["date"] else ""
        typer.echo(f"{'chat':11} template {chat['template_sha256']}{day}")
    for entry in figures["files"]:
        typer.echo(f"{entry['bytes']:>15,}  {entry['checksum']}  {entry['file']}")


@checkpoint_app.command("verify")
def verify_checkpoint(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint folder, or a run folder: all of them.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint and compare checksums. Exit code 4 if anything differs."""
    from megatrain.checkpoint.inspection import verify

    problems, num_files, num_bytes = verify(_place(path))
    if as_json:
        _print_json(
            {"path": str(path), "good": not problems, "files": num_files, "bytes": num_bytes, "problems": problems}
        )
    else:
        for problem in problems:
            typer.echo(problem, err=True)
        typer.echo(f"{path}: {num_files} files, {num_bytes:,} bytes: {'NOT GOOD' if problems else 'all as written'}.")
    if problems:
        raise typer.Exit(EXIT_CHECKPOINT)


@checkpoint_app.command("rewind")
def rewind_checkpoints(
    run: RunPlace,
    step: Annotated[int, typer.Option(min=0, help="The step to go back to; it must have a good checkpoint.")],
) -> None:
    """Go back to an earlier step: the next start resumes from STEP. Later checkpoints are set aside, not deleted."""
    from megatrain.checkpoint.inspection import rewind
    from megatrain.distributed.bootstrap import job_identity

    for taken in rewind(_place(run), step, job_identity()):
        typer.echo(f"step {taken.step:>8}  set aside: {taken.path}")
    typer.echo(f"The next start of {run} goes on from step {step}.")


@checkpoint_app.command("average")
def average_checkpoints(
    run: RunPlace,
    last: Annotated[int, typer.Option(min=2, help="How many of its good checkpoints, counted from the newest.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to make; it must not exist yet.")],
) -> None:
    """Make a checkpoint of the mean weights of a run's last ones, for run.init_from, eval, generate and export."""
    from megatrain.train.average import average_checkpoints

    steps = average_checkpoints(_place(run), last, out)
    typer.echo(f"{out} holds the mean weights of steps {', '.join(map(str, steps))} of {run}.")


@checkpoint_app.command("set-base")
def set_checkpoint_base(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of LoRA adapters, or a run folder.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="Where the weights that they adapt are now.")],
) -> None:
    """Say where the base of LoRA adapters has moved to. It must hold the same weights."""
    from megatrain.checkpoint.inspection import set_base
    from megatrain.distributed.bootstrap import job_identity

    for folder in set_base(_place(path), _place(base), job_identity()):
        typer.echo(f"{folder} has its base in {base} now.")


def main() -> None:
    """The console command."""
    try:
        app()
    except MegatrainError as error:
        typer.echo(printable(f"megatrain: {error}"), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BUG)


def _load(config: str, overrides: list[str] | None) -> RunConfig:
    from megatrain.checkpoint.origin import load

    return load(config, overrides or (), note=lambda text: typer.echo(f"note: {text}", err=True))


def _place(checkpoint: str, best: bool = False) -> Location:
    """The checkpoint or run folder that the command line names."""
    from megatrain.checkpoint.location import locate
    from megatrain.checkpoint.stores import resolve_best

    place = locate(checkpoint)
    return resolve_best(place) if best else place


def _run_on_ranks(num_ranks: int) -> int:
    """This command again, on so many ranks of this machine."""
    from megatrain.distributed.bootstrap import visible_gpus
    from megatrain.distributed.local_start import run_ranks

    gpus = len(visible_gpus())
    _refuse_shared_gpus(num_ranks, gpus)
    return run_ranks([sys.executable, "-m", "megatrain", *sys.argv[1:]], num_ranks, has_gpu=gpus > 0)


def _check_data(config: str, loaded: RunConfig) -> None:
    from megatrain.train import preview

    for note in preview.check_data(config, loaded, must_exist=True):
        typer.echo(f"warning: {note}", err=True)


def _num_local_ranks(procs: int | None) -> int:
    """Ranks to train with on this machine. Raises ConfigError where they cannot have the GPUs that they are for."""
    from megatrain.distributed.bootstrap import gpu_request, visible_gpus

    gpus = len(visible_gpus())
    if not gpus and (asked := gpu_request()) is not None:
        raise ConfigError(
            f"started for GPUs ({asked}), but {socket.gethostname()} shows none: no /dev/nvidia*, or "
            "CUDA_VISIBLE_DEVICES hides them. Look at the driver there; to train on CPUs, export DS_ACCELERATOR=cpu."
        )
    num_ranks = procs or max(gpus, 1)
    _refuse_shared_gpus(num_ranks, gpus)
    return num_ranks


def _refuse_shared_gpus(num_ranks: int, gpus: int) -> None:
    if gpus and num_ranks > gpus:
        raise ConfigError(f"--procs {num_ranks}: this machine has {gpus} GPU(s), and each rank needs its own.")


def _show_length(config: RunConfig, length: Length | None) -> None:
    """The epochs of each dataset, and the steps, where the config does not say them."""
    if length is None:
        if config.train.epochs is not None:
            typer.echo("epochs   how many steps they are is not known: the data is not on this machine")
        return
    steps = f"{length.num_steps:,} steps: " if config.train.steps is None else ""
    typer.echo(f"epochs   {steps}{', '.join(each.text() for each in length.epochs)}")
    for each in length.epochs:
        if each.warning:
            typer.echo(f"warning: {each.warning}", err=True)


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already: name another file, or remove it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def _print_json(value: object) -> None:
    import orjson

    sys.stdout.write(printable(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()) + "\n")


if __name__ == "__main__":
    main()

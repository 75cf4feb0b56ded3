"""The command `megatrain`: parse, call, turn errors into exit codes.

Only what parses the command line is imported here; each command imports what it needs, so that --help is quick and a
wrong config fails before torch is there.
"""

from __future__ import annotations

import math
import os
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatrain.cli import checkpoints, models
from megatrain.cli.options import AsJson, print_json, refuse_shared_gpus, run_on_ranks
from megatrain.errors import EXIT_BUG, ConfigError, MegatrainError
from megatrain.terminal import printable

if TYPE_CHECKING:
    from megatrain.config import RunConfig
    from megatrain.data.epochs import Length

app = typer.Typer(
    help="Train language models: check and plan a config, train it, compare runs, use checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(checkpoints.app, name="checkpoint")

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML config, or the name of a recipe: see `megatrain recipes`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Set single keys, such as train.steps=10.")
]

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
        print_json({**planned.to_json(), "epochs": [each._asdict() for each in length.epochs] if length else []})
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
        raise typer.Exit(run_on_ranks(num_ranks))
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


app.command()(models.generate)
app.command("eval")(models.evaluate)
app.command()(models.export)
app.command("import")(models.import_command)


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
        print_json([run._asdict() for run in found])
    else:
        show(found)


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
    refuse_shared_gpus(num_ranks, gpus)
    return num_ranks


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

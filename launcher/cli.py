"""The command `megatrain-launch`: batch scripts for SLURM, and what they call inside their job.

Only what parses the command line is imported here; each command imports what it needs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from megatrain.errors import EXIT_OK, EXIT_RANK, ConfigError, MegatrainError
from megatrain.terminal import printable

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Start runs on a cluster."
)
job_app = typer.Typer(help="What a batch script calls inside its job.", no_args_is_help=True)
app.add_typer(job_app, name="job")


class Via(str, Enum):
    """Who starts the ranks on the nodes."""

    DEEPSPEED = "deepspeed"
    SRUN = "srun"


Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML config, or the name of a recipe: see `megatrain recipes`.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of single keys, such as train.steps=10.")
]
Tries = Annotated[
    int, typer.Option(min=1, help="Starts in a row that leave no new checkpoint, after which a job is given up.")
]


Partition = Annotated[str | None, typer.Option(help="As for sbatch.")]
Account = Annotated[str | None, typer.Option(help="As for sbatch.")]
Qos = Annotated[str | None, typer.Option(help="As for sbatch.")]
Exclude = Annotated[str | None, typer.Option(help="Nodes to stay away from, as for sbatch.")]
Time = Annotated[str | None, typer.Option(help="Limit, as for sbatch: 30, 12:00:00, 2-00.")]
Mem = Annotated[str | None, typer.Option(help="Memory of each node (of an array: of each task), as for sbatch: 64G.")]
SiteFile = Annotated[Path | None, typer.Option("--site", help="A YAML file with this cluster's own lines.")]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch", metavar="--KEY=VALUE", help="Any option of sbatch, such as --sbatch --reservation=x; often."
    ),
]
Submit = Annotated[bool, typer.Option("--submit", help="Submit it, instead of printing it.")]
TestOnly = Annotated[bool, typer.Option("--test-only", help="Ask sbatch whether it would take it, and when it starts.")]


@app.command()
def slurm(
    config: Config,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")],
    overrides: Overrides = None,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Elastic: each start takes the nodes that are there, from so many up.")
    ] = None,
    gpus_per_node: Annotated[
        str | None,
        typer.Option(metavar="[TYPE:]N", help="GPUs of each node, one a rank: 8, h100:8. Takes whole nodes."),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Leave what the GPUs' ranks do not ask for of their nodes to others.")
    ] = False,
    procs_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node, where there are no GPUs.")
    ] = None,
    via: Annotated[
        Via | None,
        typer.Option(help="Who starts the ranks: `deepspeed`, over ssh; left out: where it cannot, `srun`."),
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Cores of each rank; ranks without GPUs are bound where it is given.")
    ] = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    exclude: Exclude = None,
    time: Time = None,
    mem: Mem = None,
    job_name: Annotated[str | None, typer.Option(help="Left out: the config's file name.")] = None,
    signal_seconds: Annotated[
        int, typer.Option(min=1, max=65535, help="How long before the limit the run is asked to save and end.")
    ] = 180,
    tries: Tries = 3,
    chain: Annotated[
        int | None, typer.Option(min=1, help="No requeueing: so many jobs, each if the one before did not finish.")
    ] = None,
    sbatch: Sbatch = None,
    site: SiteFile = None,
    submit: Submit = False,
    test_only: TestOnly = False,
) -> None:
    """Print or submit a batch script that trains CONFIG, and requeues itself when preempted or when a rank died."""
    from launcher.nodes import check_elastic
    from launcher.options import read_gpus
    from launcher.script import Job, render, why_not_ssh
    from launcher.site import read_site
    from megatrain.checkpoint.origin import load

    if (gpus_per_node is None) == (procs_per_node is None):
        raise ConfigError("give either --gpus-per-node, or --procs-per-node for nodes without GPUs.")
    ranks_per_node = read_gpus(gpus_per_node) if gpus_per_node else procs_per_node or 1
    loaded = load(config, overrides or (), note=lambda text: typer.echo(f"note: {text}", err=True))
    least = min_nodes or nodes
    check_elastic(loaded, ranks_per_node, least, nodes)
    named = _given(partition=partition, account=account, qos=qos, exclude=exclude, time=time, mem=mem)
    job = Job(
        config=config,
        overrides=tuple(overrides or ()),
        run_dir=Path.cwd() / loaded.run.dir,
        working_dir=Path.cwd(),
        nodes=nodes,
        min_nodes=least,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        is_shared=shared,
        via_ssh=via is not Via.SRUN,
        cpus_per_task=cpus_per_task,
        options=(*named, *(sbatch or ())),
        name=job_name or Path(config).stem,
        signal_seconds=signal_seconds,
        tries=tries,
        chain=chain,
    )
    here = read_site(site)
    if shared and cpus_per_task is None:
        typer.echo(
            "megatrain-launch: --shared without --cpus-per-task: SLURM mostly gives one core and its memory a rank.",
            err=True,
        )
    if via is not Via.SRUN and (why := why_not_ssh(job, here)) is not None:
        taken = "srun starts the ranks" if via is None else "--via deepspeed may fail"
        typer.echo(f"megatrain-launch: {taken}: {why}.", err=True)
        job = replace(job, via_ssh=via is Via.DEEPSPEED)
    _hand_over(lambda: render(job, here), job.logs, submit=submit, test_only=test_only, num_jobs=chain or 1)


@app.command()
def array(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND...",
            help="tokenize, dedup, filter or split of `megatrain-data`, or `megatrain`'s sweep, with its arguments.",
        ),
    ],
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks, which share the work.")],
    max_running: Annotated[int | None, typer.Option(min=1, help="At most so many tasks at the same time.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Cores of each task.")] = None,
    mem: Mem = None,
    logs: Annotated[Path, typer.Option(help="Folder for the tasks' output, one file each.")] = Path("logs"),
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    exclude: Exclude = None,
    time: Time = None,
    job_name: Annotated[str | None, typer.Option(help="Left out: the command's name.")] = None,
    sbatch: Sbatch = None,
    site: SiteFile = None,
    submit: Submit = False,
    test_only: TestOnly = False,
) -> None:
    """Print or submit an array of SLURM tasks for each stage of a command, or for a sweep; they share its work."""
    from launcher.script import Array, render_array
    from launcher.site import read_site
    from launcher.submit import make_logs, max_array_tasks, submit_stages

    named = _given(partition=partition, account=account, qos=qos, exclude=exclude, time=time, mem=mem)
    job = Array(
        command=tuple(command),
        num_tasks=tasks,
        max_running=max_running,
        cpus_per_task=cpus_per_task,
        working_dir=Path.cwd(),
        logs=Path.cwd() / logs,
        options=(*named, *(sbatch or ())),
        name=job_name or f"megatrain-{command[0]}",
    )
    most = max_array_tasks() or tasks
    if tasks > most and not job.stages:
        raise ConfigError(
            f"--tasks {tasks}: an array of this cluster has {most} tasks at the most (MaxArraySize). Give fewer."
        )
    here = read_site(site)
    if not (submit and job.stages) or test_only:
        _hand_over(lambda: render_array(job, here, most), job.logs, submit=submit, test_only=test_only)
        return
    make_logs(job.logs)
    for number in submit_stages(render_array(job, here, most), job.submissions(most)):
        typer.echo(number)


@app.command()
def doctor(
    hostfile: Annotated[
        Path | None, typer.Option(help="Hosts as for `deepspeed`, over ssh; left out: this SLURM job, or this machine.")
    ] = None,
    procs_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each node; left out: the hostfile's slots, or its GPUs.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs are written: on storage that all nodes share.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found and what each rank measured.")] = False,
) -> None:
    """Name the node, rank or link that is bad (code 5); says nothing where all is well."""
    from launcher.doctor import examine

    found = examine(hostfile, procs_per_node, folder)
    if as_json:
        typer.echo(json.dumps(found._asdict()))
    else:
        for text in found.findings:
            typer.echo(text)
        if found.exclude:
            typer.echo(f"Leave out what is bad: --exclude={','.join(found.exclude)}")
    raise typer.Exit(EXIT_RANK if found.findings else EXIT_OK)


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (run.dir of its config).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Tell how a run is doing: its job, step, rate, last save, and what is wrong."""
    from launcher.status import read_status

    found = read_status(run)
    typer.echo(json.dumps(found._asdict()) if as_json else "\n".join(found.lines()))


def _given(**options: str | None) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def _hand_over(make: Callable[[], str], logs: Path, *, submit: bool, test_only: bool, num_jobs: int = 1) -> None:
    """Print the script that ``make`` gives, or hand it to sbatch; only a script that is submitted has a folder made."""
    from launcher.submit import make_logs, submit_script, try_script

    script = make()
    if test_only:
        typer.echo(try_script(script))
    elif not submit:
        typer.echo(script, nl=False)
    else:
        make_logs(logs)
        for number in submit_script(make(), num_jobs):
            typer.echo(number)


@job_app.command()
def begin(
    config: Config,
    overrides: Overrides = None,
    tries: Tries = 3,
    min_nodes: Annotated[
        int | None, typer.Option(min=1, help="Elastic: print too how many of the job's nodes to use, from so many up.")
    ] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node, where the job is elastic.")] = 1,
) -> None:
    """Before the ranks: refuse a run folder in use, forget what the start before left; prints a port that is free."""
    from launcher.job import begin_job
    from launcher.nodes import choose_nodes
    from megatrain.checkpoint.origin import load

    loaded = load(config, overrides or ())
    nodes = choose_nodes(loaded, ranks_per_node, min_nodes) if min_nodes else None
    port = begin_job(loaded, tries)
    typer.echo(port if nodes is None else f"{port} {nodes}")


@job_app.command()
def nodes() -> None:
    """Print the nodes of this job, one a line: what `scontrol show hostnames` says, where it knows the names' kind."""
    from launcher.nodes import job_nodes

    typer.echo("\n".join(job_nodes()))


@job_app.command()
def environment() -> None:
    """Print the variables that ranks on other nodes need, as a shell reads them; secrets are left out, and named."""
    from launcher.environment import exports, secrets

    if left_out := secrets(os.environ):
        typer.echo(
            f"Not passed on over ssh, as they look like secrets: {', '.join(left_out)}. Ranks on other nodes that need "
            "them find them in files (such as ~/.aws/credentials), or with --via srun.",
            err=True,
        )
    typer.echo(exports(os.environ), nl=False)


@job_app.command()
def sweep() -> None:
    """End the ranks that an earlier start of this job left on this node."""
    from launcher.job import end_leftovers

    end_leftovers()


@job_app.command()
def watch(
    config: Config,
    launcher: Annotated[int, typer.Option(help="The process of `deepspeed`: when it has ended, so does this.")],
    hostfile: Annotated[Path, typer.Option(help="The nodes that it starts ranks on.")],
    overrides: Overrides = None,
) -> None:
    """While `deepspeed` runs: where it has ended on one node, tell the ranks that still wait for those of that one."""
    from launcher.watch import watch_nodes
    from megatrain.checkpoint.origin import load

    watch_nodes(Path(load(config, overrides or ()).run.dir), launcher, hostfile)


@job_app.command()
def relay(
    signal_name: Annotated[str, typer.Argument(metavar="SIGNAL", help="Such as USR1.")],
    script: Annotated[int, typer.Option(help="The batch script's process: when it has ended, nobody waits any more.")],
) -> None:
    """Send a signal to one of this job's ranks on this node, as soon as there is one: it tells the others."""
    from launcher.job import ignore_termination, relay_signal

    ignore_termination()
    relay_signal(signal_name, script)


@job_app.command()
def end(
    config: Config,
    code: Annotated[int, typer.Option(help="The exit code of what started the ranks.")],
    overrides: Overrides = None,
    tries: Tries = 3,
) -> None:
    """After the ranks: end those that are left; prints "requeue" or "stop", and exits with the first cause's code."""
    from launcher.job import end_job, ignore_termination
    from megatrain.checkpoint.origin import load

    ignore_termination()
    answer, cause = end_job(load(config, overrides or ()), code, tries)
    typer.echo(answer)
    raise typer.Exit(cause)


@job_app.command()
def end_chain() -> None:
    """Cancel the jobs that wait for this one to fail: they would end as it does, or have nothing to do."""
    from launcher.job import cancel_rest, ignore_termination

    ignore_termination()
    cancel_rest()


def main() -> None:
    try:
        app(prog_name="megatrain-launch")
    except MegatrainError as error:
        typer.echo(printable(f"megatrain-launch: {error}"), err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

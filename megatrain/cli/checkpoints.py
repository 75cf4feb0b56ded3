"""The commands `megatrain checkpoint ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatrain.cli.options import AsJson, CheckpointPath, place_of, print_json
from megatrain.errors import EXIT_CHECKPOINT

app = typer.Typer(help="List, inspect, verify, rewind and average the checkpoints of a run.", no_args_is_help=True)

RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the URL of its checkpoints.")]


@app.command("list")
def list_checkpoints(run: RunPlace, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, oldest first: tokens trained on, validation loss, good or damaged."""
    from megatrain.checkpoint.inspection import list_checkpoints

    rows = list_checkpoints(place_of(run))
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    for row in rows:
        tokens, loss = (
            ("?", None) if row.manifest is None else (f"{row.manifest.tokens:,}", row.manifest.validation_loss)
        )
        validation = "" if loss is None else f"validation loss {loss:.4f}"
        state = "good" if row.good else f"NOT GOOD: {row.problem}"
        typer.echo(f"step {row.step:>8}  {tokens:>15} tokens  {validation:<22}  {row.path}  {state}")


@app.command("inspect")
def inspect_checkpoint(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: step, tokens, layout, files."""
    from megatrain.checkpoint.inspection import describe

    figures = describe(place_of(path))
    if as_json:
        print_json(figures)
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


@app.command("verify")
def verify_checkpoint(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint folder, or a run folder: all of them.")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint and compare checksums. Exit code 4 if anything differs."""
    from megatrain.checkpoint.inspection import verify

    problems, num_files, num_bytes = verify(place_of(path))
    if as_json:
        print_json(
            {"path": str(path), "good": not problems, "files": num_files, "bytes": num_bytes, "problems": problems}
        )
    else:
        for problem in problems:
            typer.echo(problem, err=True)
        typer.echo(f"{path}: {num_files} files, {num_bytes:,} bytes: {'NOT GOOD' if problems else 'all as written'}.")
    if problems:
        raise typer.Exit(EXIT_CHECKPOINT)


@app.command("rewind")
def rewind_checkpoints(
    run: RunPlace,
    step: Annotated[int, typer.Option(min=0, help="The step to go back to; it must have a good checkpoint.")],
) -> None:
    """Go back to an earlier step: the next start resumes from STEP. Later checkpoints are set aside, not deleted."""
    from megatrain.checkpoint.inspection import rewind
    from megatrain.distributed.bootstrap import job_identity

    for taken in rewind(place_of(run), step, job_identity()):
        typer.echo(f"step {taken.step:>8}  set aside: {taken.path}")
    typer.echo(f"The next start of {run} goes on from step {step}.")


@app.command("average")
def average_checkpoints(
    run: RunPlace,
    last: Annotated[int, typer.Option(min=2, help="How many of its good checkpoints, counted from the newest.")],
    out: Annotated[Path, typer.Option(help="The checkpoint folder to make; it must not exist yet.")],
) -> None:
    """Make a checkpoint of the mean weights of a run's last ones, for run.init_from, eval, generate and export."""
    from megatrain.train.average import average_checkpoints

    steps = average_checkpoints(place_of(run), last, out)
    typer.echo(f"{out} holds the mean weights of steps {', '.join(map(str, steps))} of {run}.")


@app.command("set-base")
def set_checkpoint_base(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of LoRA adapters, or a run folder.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="Where the weights that they adapt are now.")],
) -> None:
    """Say where the base of LoRA adapters has moved to. It must hold the same weights."""
    from megatrain.checkpoint.inspection import set_base
    from megatrain.distributed.bootstrap import job_identity

    for folder in set_base(place_of(path), place_of(base), job_identity()):
        typer.echo(f"{folder} has its base in {base} now.")

"""What commands of several modules share: arguments, places, ranks, JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from megatrain.errors import ConfigError
from megatrain.terminal import printable

if TYPE_CHECKING:
    from megatrain.checkpoint.location import Location

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint folder, or a run folder (its newest good checkpoint), or the URL of either.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, and nothing else.")]


def place_of(checkpoint: str, best: bool = False) -> Location:
    """The checkpoint or run folder that the command line names."""
    from megatrain.checkpoint.location import locate
    from megatrain.checkpoint.stores import resolve_best

    place = locate(checkpoint)
    return resolve_best(place) if best else place


def run_on_ranks(num_ranks: int) -> int:
    """This command again, on so many ranks of this machine."""
    from megatrain.distributed.bootstrap import visible_gpus
    from megatrain.distributed.local_start import run_ranks

    gpus = len(visible_gpus())
    refuse_shared_gpus(num_ranks, gpus)
    return run_ranks([sys.executable, "-m", "megatrain", *sys.argv[1:]], num_ranks, has_gpu=gpus > 0)


def refuse_shared_gpus(num_ranks: int, gpus: int) -> None:
    if gpus and num_ranks > gpus:
        raise ConfigError(f"--procs {num_ranks}: this machine has {gpus} GPU(s), and each rank needs its own.")


def print_json(value: object) -> None:
    import orjson

    sys.stdout.write(printable(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()) + "\n")

"""What `megatrain profile` has found, as its table shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatrain.observe.trace import Breakdown, Part
from megatrain.units import format_bytes

_MOST_KERNELS = 15
_SMALLEST_SHARE = 0.0005
_LONGEST_NAME = 70
_WIDTH = 160  # a narrower terminal breaks the lines by itself


@dataclass(frozen=True)
class RankProfile:
    """Of one rank: ``plain_seconds``: a step before the profiler ran; ``trace``: the file's name, in the same folder;
    ``is_gpu``: whose times they are."""

    rank: int
    stage: int
    device: str
    is_gpu: bool
    num_steps: int
    plain_seconds: float
    peak_memory_bytes: int
    trace: str
    steps: Breakdown

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def show(ranks: Sequence[RankProfile], console: Console | None = None) -> None:
    """Print the first rank's parts and kernels, and how the ranks compare where there are several."""
    console = console or Console(width=_WIDTH, highlight=False, markup=False, soft_wrap=True)
    first = ranks[0]
    for line in _head(first):
        console.print(line)
    console.print("", _parts(first), "", _kernels(first), sep="\n")
    if len(ranks) > 1:
        console.print("", _ranks(ranks), sep="\n")


def _head(rank: RankProfile) -> list[str]:
    steps, slower = rank.steps, rank.steps.step / rank.plain_seconds - 1
    busy = steps.step - steps.messages - steps.idle
    of = "operations on the GPU" if rank.is_gpu else "operations, on the CPU's thread that trains"
    between = "the GPU waited" if rank.is_gpu else "between operations"
    shares = f"{busy / steps.step:.1%} {of}, {steps.messages / steps.step:.1%} waiting for messages of other ranks"
    return [
        f"rank     {rank.rank}, {rank.device}: means of {rank.num_steps} steps",
        f"step     {steps.step * 1e3:,.1f} ms, {slower:+.1%} of a step without the profiler",
        f"time     {shares}, {steps.idle / steps.step:.1%} {between}; {steps.hidden * 1e3:,.1f} ms of messages hidden",
        f"memory   {format_bytes(rank.peak_memory_bytes)} at the peak",
    ]


def _parts(rank: RankProfile) -> Table:
    steps = rank.steps
    table = _table("ms of a step, by part", "part")
    idle = "waited" if rank.is_gpu else "between"
    for column in ("forward", "backward", "outside", idle, "all", "of the step", "kept", "peak"):
        table.add_column(column, justify="right")
    shown = [part for part in steps.parts if part.seconds >= _SMALLEST_SHARE * steps.step]
    rest = [part for part in steps.parts if part not in shown]
    for part in shown:
        sizes = [format_bytes(size) if size > 0 else "" for size in (part.kept_bytes, part.peak_bytes)]
        table.add_row(part.name, *map(_ms, _times(part)), _ms(part.seconds), _share(part.seconds, rank), *sizes)
    if rest:
        times = [sum(column) for column in zip(*map(_times, rest), strict=True)]
        table.add_row(f"{len(rest)} smaller ones", *map(_ms, times), _ms(sum(times)), _share(sum(times), rank))
    if steps.messages:
        table.add_row("messages", "", "", "", "", _ms(steps.messages), _share(steps.messages, rank))
    totals = [sum(column) for column in zip(*map(_times, steps.parts), strict=True)]
    table.add_row("step", *map(_ms, totals), _ms(steps.step), "100.0%", end_section=True)
    return table


def _kernels(rank: RankProfile) -> Table:
    table = _table("ms of a step, by kernel" if rank.is_gpu else "ms of a step, by operation", "kernel")
    for column in ("calls", "ms", "of the step"):
        table.add_column(column, justify="right")
    for kernel in rank.steps.kernels[:_MOST_KERNELS]:
        name = kernel.name if len(kernel.name) <= _LONGEST_NAME else f"{kernel.name[:_LONGEST_NAME]}..."
        table.add_row(name, f"{kernel.calls:,.0f}", _ms(kernel.seconds), _share(kernel.seconds, rank))
    return table


def _ranks(ranks: Sequence[RankProfile]) -> Table:
    table = _table("the first rank of each pipeline stage", "rank")
    for column in ("stage", "step", "operations", "messages", "idle", "memory", "trace"):
        table.add_column(column, justify="right")
    for rank in ranks:
        steps = rank.steps
        busy = steps.step - steps.messages - steps.idle
        shares = (_share(seconds, rank) for seconds in (busy, steps.messages, steps.idle))
        memory = format_bytes(rank.peak_memory_bytes)
        table.add_row(f"{rank.rank}", f"{rank.stage}", f"{_ms(steps.step)} ms", *shares, memory, rank.trace)
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first)
    return table


def _times(part: Part) -> tuple[float, ...]:
    return part.forward, part.backward, part.outside, part.idle


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}" if seconds else ""


def _share(seconds: float, rank: RankProfile) -> str:
    return f"{seconds / rank.steps.step:.1%}"

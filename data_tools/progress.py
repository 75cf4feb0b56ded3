"""How far the work is, on standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_tools.executors import Advance
from megatrain.units import format_bytes, format_duration

LOG_SECONDS = 10.0
RATE_SECONDS = 600.0
"""The rate is the mean over so long."""


@contextmanager
def show_progress(name: str, total_bytes: int) -> Iterator[Advance]:
    """Show bytes done, rate and time left of the work called `name`; yield the function that is given bytes done.

    A log gets a line every LOG_SECONDS, none for work that is done before the first is due.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    is_log, last = not console.is_terminal, time.monotonic()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=is_log, speed_estimate_period=RATE_SECONDS
    ) as bar:
        work = bar.add_task(name, total=total_bytes)

        def advance(num_bytes: int) -> None:
            nonlocal last
            bar.update(work, advance=num_bytes)
            task = bar.tasks[0]
            if not is_log or not task.completed or time.monotonic() - last < LOG_SECONDS:
                return
            last = time.monotonic()
            rate = task.speed or task.completed / (task.elapsed or 1e-9)  # rich knows none from one sample
            done = f"{name}: {task.percentage:.0f}% of {format_bytes(total_bytes)}"
            left = format_duration((total_bytes - task.completed) / rate)
            console.print(f"{done}, {format_bytes(rate)}/s, {left} left", highlight=False)

        yield advance


@contextmanager
def no_progress(name: str, total_bytes: int) -> Iterator[Advance]:
    """Show nothing: another rank does."""
    yield lambda num_bytes: None

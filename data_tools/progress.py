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

from data_tools.work import Advance
from megatrain.units import format_bytes, format_duration

LOG_SECONDS = 10.0


@contextmanager
def show_progress(name: str, total_bytes: int) -> Iterator[Advance]:
    """Show bytes done, rate and time left of the work called `name`; give the function that hears of bytes done."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(name, total=total_bytes)
            yield lambda num_bytes: bar.update(task, advance=num_bytes)
        return
    log = _Log(console, name, total_bytes)
    yield log.advance


@contextmanager
def no_progress(name: str, total_bytes: int) -> Iterator[Advance]:
    """Show nothing: another rank does."""
    yield lambda num_bytes: None


class _Log:
    """A line every LOG_SECONDS, none for work that is done before the first is due."""

    def __init__(self, console: Console, name: str, total_bytes: int) -> None:
        self._console = console
        self._name = name
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._start = self._last = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.monotonic()
        if now - self._last < LOG_SECONDS or not self._done_bytes:
            return
        self._last = now
        rate = self._done_bytes / (now - self._start)
        left = max(self._total_bytes - self._done_bytes, 0) / rate
        share = min(self._done_bytes / max(self._total_bytes, 1), 1.0)
        self._console.print(
            f"{self._name}: {share:.0%} of {format_bytes(self._total_bytes)}, {format_bytes(rate)}/s, "
            f"{format_duration(left)} left",
            highlight=False,
        )

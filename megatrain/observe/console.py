"""What rank 0 shows: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatrain.observe.metrics import StepMetrics
from megatrain.units import format_count, format_duration

NUM_STEPS_OF_PACE = 50


class LastingConsole(Console):
    """Standard output whose reader may be gone: the run goes on without output instead of ending."""

    def on_broken_pipe(self) -> None:
        """Send all further output nowhere, as rich does, but do not exit."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class ProgressConsole:
    """Shows a run's progress: one line that is drawn anew on a terminal, else one line for each logged step."""

    def __init__(self, num_steps: int, resume_step: int = 0, console: Console | None = None) -> None:
        self._console = console or LastingConsole()
        self._num_steps = num_steps
        self._pace = deque([(resume_step, time.monotonic())], maxlen=NUM_STEPS_OF_PACE)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task("steps", total=num_steps, completed=resume_step, figures="")

    def start(self, facts: Mapping[str, str]) -> None:
        """Print the facts of the run, one a line, then begin to show progress."""
        width = max(map(len, facts), default=0)
        for name, fact in facts.items():
            self.line(f"{name:<{width}}  {fact}")
        self._progress.start()

    def step(self, metrics: StepMetrics) -> None:
        self._pace.append((metrics.step, time.monotonic()))
        figures = f"loss {metrics.loss:.4f} | {format_count(metrics.tokens_per_second)} tokens/s"
        if metrics.mfu is not None:
            figures += f" | MFU {metrics.mfu:.1%}"
        left = f"{format_duration(self.seconds_left())} left"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=metrics.step, figures=f"{figures} | {left}")
        else:
            optimizer = f"grad norm {metrics.grad_norm:.3f} | lr {metrics.lr:.2e}"
            self.line(f"step {metrics.step}/{self._num_steps} | {figures} | {optimizer} | {left}")

    def seconds_left(self) -> float:
        """Time that the remaining steps take at the pace of the last logged ones, saves and validations included."""
        (first_step, started), (last_step, ended) = self._pace[0], self._pace[-1]
        if last_step == first_step:
            return float("nan")
        return (self._num_steps - last_step) * (ended - started) / (last_step - first_step)

    def line(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:  # a full disk behind a redirection
            self._console.on_broken_pipe()

    def close(self) -> None:
        self._progress.stop()

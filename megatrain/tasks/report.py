"""The table of `megatrain eval --tasks`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatrain.tasks.evaluation import TaskResult


def show_results(results: Sequence[TaskResult]) -> None:
    """Print each metric of each task with its standard error, and what was left out."""
    table = Table("task", "metric", "value", "stderr", "examples", box=None)
    for result in results:
        for name, metric in result.figures.items():
            stderr = "" if metric.stderr is None else f"{metric.stderr:.4f}"
            table.add_row(result.task.name, name, f"{metric.value:.4f}", stderr, f"{metric.n:,}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for result in results:
        for count, what in (
            (len(result.skipped), "examples are longer than the model's context: left out"),
            (result.num_shots_dropped, "solved rows had no room in the context"),
        ):
            if count:
                console.print(f"{result.task.name}: {count:,} {what}.")

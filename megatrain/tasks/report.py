"""The table of `megatrain eval --tasks`, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatrain.tasks.evaluation import TaskResult
from megatrain.tasks.metrics import Metric


def show_results(results: Sequence[TaskResult]) -> None:
    """Print each metric of each task with its standard error and confidence interval, and what was left out."""
    table = Table("task", "metric", "value", "stderr", "95% interval", "examples", box=None)
    for result in results:
        differences = {f"{name} - baseline": metric for name, metric in result.differences.items()}
        for name, metric in {**result.figures, **differences}.items():
            stderr = "" if metric.stderr is None else f"{metric.stderr:.4f}"
            interval = "{:.4g} to {:.4g}".format(*metric.confidence_interval) if metric.confidence_interval else ""
            table.add_row(result.task.name, name, f"{metric.value:.4f}", stderr, interval, f"{metric.n:,}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for result in results:
        for name, metric in result.figures.items():
            if metric.signature is not None:
                console.print(f"{result.task.name}: {name} by sacrebleu: {metric.signature}")
        for count, what in (
            (len(result.skipped), "examples are longer than the model's context: left out"),
            (result.num_shots_dropped, "solved rows had no room in the context"),
        ):
            if count:
                console.print(f"{result.task.name}: {count:,} {what}.")


def to_json(results: Sequence[TaskResult]) -> dict[str, Any]:
    """By the names of the tasks: their figures, their differences from a baseline if there is one, and how much was
    left out."""

    def all_of(metrics: Mapping[str, Metric]) -> dict[str, Any]:
        return {name: metric.to_json() for name, metric in metrics.items()}

    shown: dict[str, Any] = {"tasks": {result.task.name: all_of(result.figures) for result in results}}
    if any(result.differences for result in results):
        shown["differences"] = {result.task.name: all_of(result.differences) for result in results}
    return {**shown, "left_out": {result.task.name: result.left_out for result in results}}

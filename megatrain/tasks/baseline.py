"""Another model's answers to the same tasks, from the file that `eval --out` wrote: what a model is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.config.tasks import Task
from megatrain.data.json_lines import read_objects
from megatrain.errors import DataError
from megatrain.tasks.metrics import Metric, Outcome, compare


class Baseline:
    """The answers in a file. Raises DataError where it is none that `eval --out` wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[str, int], Mapping[str, Any]] = {}
        for number, record in read_objects(path):
            if not (isinstance(record.get("row"), int) and isinstance(record.get("figures"), dict)):
                raise DataError(f"{path}, line {number}: no answer to a task: give a file of `megatrain eval --out`.")
            self._records[str(record.get("task")), record["row"]] = record

    def compare(self, task: Task, outcomes: Sequence[Outcome]) -> dict[str, Metric]:
        """The metrics of ``outcomes`` less those of this file. Raises DataError where it answers other rows."""
        rows = {row for name, row in self._records if name == task.name}
        if others := rows ^ {outcome.example.row for outcome in outcomes}:
            raise DataError(
                f"Task {task.name}: {self._path} and this model do not answer the same rows (row {min(others)} is in "
                "one of them alone): they cannot be compared. Answer the same tasks with both."
            )
        return compare(task, outcomes, [self._answer(task, outcome) for outcome in outcomes])

    def _answer(self, task: Task, outcome: Outcome) -> Outcome:
        record = self._records[task.name, outcome.example.row]
        if record["figures"].keys() != outcome.figures.keys():
            raise DataError(f"Task {task.name}: in {self._path} it is of another kind.")
        return Outcome(outcome.example, record["figures"], record)

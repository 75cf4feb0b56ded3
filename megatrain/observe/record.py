"""What a run left behind, read back: the columns of metrics.jsonl, its events, its config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.errors import DataError
from megatrain.observe.goodput import Goodput, goodput_of
from megatrain.observe.metrics import METRICS_FILE, LossTrend, StepMetrics, read_lines

CONFIG_FILE = "config.yaml"
_START_CONFIG = re.compile(r"config-step-(\d+)\.yaml")

Column = NDArray[np.float64]


@dataclass(frozen=True)
class RunRecord:
    """A run as recorded. Each column has one figure a logged step, NaN where it was not finite or not known.

    ``parts``: seconds of each part of a step. ``validation_steps`` and ``validation_losses``: one entry a validation.
    ``validation_sets``: the same two of each dataset, by its name.
    ``tasks``: the figures of train.tasks by step, as in metrics.jsonl.
    ``events``: the lines of events, in the order they happened. ``configs``: what was trained with, by the step after
    which it began, where it changed. ``goodput``: up to the last line, where it is known.
    """

    name: str
    columns: Mapping[str, Column]
    parts: Mapping[str, Column]
    validation_steps: Column
    validation_losses: Column
    validation_sets: Mapping[str, tuple[Column, Column]]
    tasks: Mapping[int, Mapping[str, Mapping[str, Mapping[str, Any]]]]
    events: Sequence[Mapping[str, Any]]
    configs: Mapping[int, str]
    goodput: Goodput | None

    @property
    def steps(self) -> Column:
        return self.columns["step"]

    def divergence(self) -> str | None:
        """How it has diverged, in words; None: it has not."""
        trend = LossTrend()
        for loss in self.columns["loss"].tolist():
            trend.add(loss)
        return trend.divergence()

    @property
    def resumed_at(self) -> list[int]:
        return [event["step"] for event in self.events if event["event"] == "resume"]


COLUMNS = ("time", *(each.name for each in fields(StepMetrics) if each.name not in ("parts", "ranks", "goodput")))


def read_run(run_dir: Path) -> RunRecord:
    """Read RUN/metrics.jsonl and RUN/config.yaml, of a finished run or of one that still writes.

    Raises ``DataError`` for a folder that holds no metrics or whose metrics cannot be read.
    """
    steps: dict[int, Mapping[str, Any]] = {}  # by step: where lines of one step are found twice, the later one counts
    validations: dict[int, float] = {}
    of_sets: dict[str, dict[int, float]] = {}
    tasks: dict[int, Mapping[str, Any]] = {}
    events: list[Mapping[str, Any]] = []
    goodput = None
    for line in _read_lines(run_dir):
        goodput = goodput_of(line) or goodput
        if "event" in line:
            events.append(line)
        elif "validation_loss" in line:
            validations[line["step"]] = _number(line["validation_loss"])
            for name, loss in (line.get("validation_losses") or {}).items():
                of_sets.setdefault(name, {})[line["step"]] = _number(loss)
        elif line.get("tasks"):
            tasks[line["step"]] = line["tasks"]
        elif "loss" in line:
            steps[line["step"]] = line
    if not steps:
        raise DataError(
            f"{run_dir / METRICS_FILE}: no training step has been logged yet, so there is nothing to report."
        )
    lines = [steps[step] for step in sorted(steps)]
    parts = [line["parts"] if isinstance(line.get("parts"), dict) else {} for line in lines]
    steps_of_validations, losses_of_validations = _by_step(validations)
    part_names = dict.fromkeys(name for part in parts for name in part)
    return RunRecord(
        name=run_dir.resolve().name,
        columns={name: _column(lines, name) for name in COLUMNS},
        parts={name: np.nan_to_num(_column(parts, name)) for name in part_names},
        validation_steps=steps_of_validations,
        validation_losses=losses_of_validations,
        validation_sets={name: _by_step(losses) for name, losses in of_sets.items()},
        tasks=tasks,
        events=events,
        configs=_read_configs(run_dir),
        goodput=goodput,
    )


def _read_lines(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return list(read_lines(run_dir))
    except OSError as error:
        raise DataError(
            f"{run_dir / METRICS_FILE}: {error.strerror}. Give the folder of a run (run.dir of its config), which "
            f"holds {METRICS_FILE} once its first step is logged."
        ) from None


def start_config_file(step: int) -> str:
    """The name of the file with the config of a start that went on from the state after ``step``."""
    return f"config-step-{step}.yaml"


def start_configs(run_dir: Path) -> dict[int, Path]:
    """These files of a run, by that step, in order."""
    found = {int(match[1]): path for path in run_dir.glob("*") if (match := _START_CONFIG.fullmatch(path.name))}
    return dict(sorted(found.items()))


def last_saved_step(run_dir: Path) -> int | None:
    """The last step of which a run's records say that its state was saved; None where there is none."""
    try:
        saved = [line["step"] for line in read_lines(run_dir, having=b'"event"') if line.get("event") == "save"]
    except OSError:
        saved = []
    return max([*saved, *(step for step in start_configs(run_dir) if step > 0)], default=None)


def _read_configs(run_dir: Path) -> dict[int, str]:
    """Each config that differs from the one before; of runs that kept none for each start, the one that there is."""
    paths = start_configs(run_dir) or {0: run_dir / CONFIG_FILE}
    configs: dict[int, str] = {}
    for step, path in paths.items():
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if text and text != next(reversed(configs.values()), None):
            configs[step] = text
    return configs


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> Column:
    return np.array([_number(line.get(name)) for line in lines], dtype=np.float64)


def _by_step(values: Mapping[int, float]) -> tuple[Column, Column]:
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")

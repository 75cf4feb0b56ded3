"""The figures of a step, and the file they are kept in: RUN/metrics.jsonl, one JSON object a line.

Four kinds of lines: of a step (``StepMetrics``), of a validation (``step``, ``validation_loss``, by dataset
``validation_losses``, and of tokens ``perplexity``), of train.tasks (``step``, ``tasks``: name, metric, value and
standard error), and of an event (``event``, ``step``). Every line also has ``time``, in seconds since 1970. A figure
that is not finite is null.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeAlias

import orjson

from megatrain.atomic import committed
from megatrain.observe.append import AppendFile

METRICS_FILE = "metrics.jsonl"
NUM_STEPS = "num_steps"
"""What the run's steps stand under in the lines of starts and resumes."""
_NUM_LAST_LOSSES = 10
_ABOVE_FIRST = 1.02
_KINDS: Mapping[type | UnionType, str] = {
    int
    | float: "time tokens loss grad_norm lr step_seconds tokens_per_second mfu skipped memory_bytes validation_loss "
    "perplexity num_steps",
    dict: "parts ranks goodput validation_losses tasks",
    str: "event message",
}
"""Of what kind the values of these keys are."""
_TAIL_BYTES = 1 << 20
"""Weeks of the file need not be read for its last lines."""


TaskFigures: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By the names of a task and of a metric: ``value``, its standard error ``stderr``, ``n`` examples, and what else there
is of it (`megatrain.tasks.metrics.Metric`)."""


class Spread(NamedTuple):
    """Seconds of one thing over all ranks, and which rank took the most."""

    min: float
    median: float
    max: float
    slowest: int


@dataclass(frozen=True)
class StepMetrics:
    """What is known of one training step once it has ended; the counts of steps and tokens include it.

    ``tokens``: targets trained on since the run began; ``tokens_per_second`` counts the same. ``loss``: mean
    cross-entropy in nats over the targets of the global batch, before the update. ``grad_norm``: global L2 norm before
    clipping. ``mfu``: share of the devices' peak, by all tokens of the samples, scored or not; None where the peak is
    unknown. ``skipped``: updates left out since the run began. ``parts``: seconds of each part of the step (data,
    forward_backward, exchange, optimizer, eval, save, other), together ``step_seconds``: means over the steps since
    figures were last fetched, as is ``tokens_per_second``. ``memory_bytes``: the most that this rank has held.
    ``ranks``: where ranks were compared after this step, seconds of each part over all of them, a step's mean since the
    last comparison, and of "arithmetic", the same piece of it on each. ``goodput``: where all time since the first
    start went, in seconds, by the parts of ``observe.goodput``.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    skipped: int
    memory_bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, Spread] = field(default_factory=dict)
    goodput: Mapping[str, float] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """As metrics.jsonl has it; parts of a step that were not compared are left out."""
        line = {**vars(self), "ranks": {part: spread._asdict() for part, spread in self.ranks.items()}}
        return {name: value for name, value in line.items() if value != {} or name == "parts"}


@dataclass
class LossTrend:
    """The loss of the first logged step, and of the last ones."""

    first: float | None = None
    last: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_LAST_LOSSES))
    num_steps: int = 0

    def add(self, loss: float | None) -> None:
        """One more step; None: its loss was not finite."""
        loss = math.nan if loss is None else loss
        self.first = loss if self.num_steps == 0 else self.first
        self.last.append(loss)
        self.num_steps += 1

    def divergence(self) -> str | None:
        """How the run has diverged, in words; None: it has not. Judged by the median of the last quarter, ten steps at
        most, against the first; the first itself is known to 2% alone."""
        if self.first is None:
            return None
        last = [*self.last][-max(self.num_steps // 4, 1) :]
        if not all(map(math.isfinite, last)):
            return "it diverged: the loss is not finite in the end"
        final = statistics.median(last)
        if final <= self.first * _ABOVE_FIRST:
            return None
        return f"it diverged: the loss was {self.first:,.4g} at first and is {final:,.4g} in the end"


class MetricsWriter:
    """Appends to RUN/metrics.jsonl, on one rank only; never raises for a disk that is full or cannot be written.

    A run that resumes at step s computes the steps after s again: their first lines are dropped when the file is
    opened, so that it holds each step once. Lines of events stay, for they did happen.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        self.num_dropped_steps = 0
        self.trend = LossTrend()
        self._resume_step = resume_step
        self._path = run_dir / METRICS_FILE
        self._file = AppendFile(self._path, prepare=self._drop_superseded)

    def step(self, metrics: StepMetrics) -> None:
        self.trend.add(metrics.loss)
        self._append(metrics.line())

    def validation(
        self,
        step: int,
        loss: float,
        seconds: float,
        each: Mapping[str, float] | None = None,
        perplexity: float | None = None,
    ) -> None:
        """Append the line of a validation after ``step`` steps that took ``seconds``; ``each``: losses by dataset."""
        further: dict[str, Any] = {"validation_losses": {**each}} if each else {}
        further |= {} if perplexity is None else {"perplexity": perplexity}
        self._append({"step": step, "validation_loss": loss, **further, "seconds": seconds})

    def tasks(self, step: int, figures: TaskFigures, seconds: float) -> None:
        """Append the figures of train.tasks after ``step`` steps, and the seconds they took."""
        self._append({"step": step, "tasks": figures, "seconds": seconds})

    def event(self, name: str, step: int, facts: Mapping[str, Any] | None = None) -> None:
        """Append the line of an event (start, resume, save, ...) after ``step`` steps, with what else is known."""
        self._append({"event": name, "step": step, **(facts or {})})

    def close(self) -> None:
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.append(orjson.dumps({**line, "time": time.time()}, option=orjson.OPT_APPEND_NEWLINE))

    def _drop_superseded(self) -> None:
        """Rewrite the file without the steps after the resumed one and without torn lines."""
        if not self._path.exists():
            return
        num_dropped, trend = 0, LossTrend()
        with (
            committed(self._path, single_writer=True) as unfinished,
            self._path.open("rb") as lines,
            unfinished.open("wb") as kept,
        ):
            for text in lines:
                line = parse_line(text)
                if line is None or ("event" not in line and line["step"] > self._resume_step):
                    num_dropped += line is not None and "loss" in line
                else:
                    kept.write(text)
                    if "loss" in line:
                        trend.add(line["loss"])
        self.num_dropped_steps, self.trend = num_dropped, trend


def read_lines(run_dir: Path, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, or those with ``having`` in their text. Raises OSError."""
    with (run_dir / METRICS_FILE).open("rb") as file:
        yield from (line for text in file if having in text and (line := parse_line(text)) is not None)


def last_num_steps(run_dir: Path) -> int | None:
    """How many steps the run has, as its last start said; None where none did."""
    found = None
    with contextlib.suppress(OSError):
        for line in read_lines(run_dir, NUM_STEPS.encode()):
            found = line.get(NUM_STEPS, found)
    return found


def tail(run_dir: Path) -> list[dict[str, Any]]:
    """The last lines of RUN/metrics.jsonl, those within 1 MiB; none where there is no such file."""
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return [line for text in file if (line := parse_line(text)) is not None]
    except OSError:
        return []


def parse_line(text: bytes) -> dict[str, Any] | None:
    """The object on one line of the file, null for values of the wrong kind; None for a line that a crash left torn."""
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not (text.endswith(b"\n") and isinstance(line, dict) and type(line.get("step")) is int):
        return None
    for kind, names in _KINDS.items():
        line |= {name: None for name in names.split() if name in line and not isinstance(line[name], kind)}
    return line if line.get("event", "") is not None else None

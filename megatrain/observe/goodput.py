"""Goodput: where all the time since a run's first start went, and how much of it trained the model.

Every moment belongs to one part, so that the parts together are the time from the beginning of the first start to now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatrain.observe.metrics import tail
from megatrain.units import format_duration

PART_NAMES = {"restarting": "starting"}
"""A part in words, where its key says less: the first start is none again."""


class Goodput(NamedTuple):
    """Seconds of each part of a run's time.

    ``training``: steps that still count, their evaluations included. ``saving``: training stood still for a checkpoint.
    ``restarting``: from the beginning of each start until it stepped, and going back for a spike. ``recomputing``:
    steps that were lost and had to be taken again. ``waiting``: from a start's last sign of life in metrics.jsonl to
    the beginning of the next one: dying, being noticed, standing in a queue.
    """

    training: float = 0.0
    saving: float = 0.0
    restarting: float = 0.0
    recomputing: float = 0.0
    waiting: float = 0.0

    @property
    def wall_seconds(self) -> float:
        return sum(self)

    @property
    def shares(self) -> dict[str, float]:
        """Of each part, of all the time; that of training is the goodput."""
        wall = self.wall_seconds or 1.0
        return {part: seconds / wall for part, seconds in self._asdict().items()}

    def text(self) -> str:
        training, *lost = self.shares.items()
        parts = ", ".join(f"{PART_NAMES.get(part, part)} {share:.1%}" for part, share in lost)
        return f"goodput {training[1]:.1%} of {format_duration(self.wall_seconds)} since the first start ({parts})"


class GoodputLedger:
    """Counts the time of a run, from start to start, on rank 0. What earlier starts counted is in metrics.jsonl.

    ``began``: when this start began, in seconds since 1970. ``now``: the clock.
    """

    def __init__(self, run_dir: Path, began: float, now: Callable[[], float] = time.time) -> None:
        before, until = last_goodput(run_dir) or (Goodput(), began)
        self._figures = before._replace(waiting=before.waiting + max(began - until, 0.0))
        self._now, self._last = now, max(began, until)

    def begin(self, training_seconds: float) -> None:
        """Steps begin, from a state that took ``training_seconds`` of training: all time since the last lap went into
        getting there, and what was trained behind that state is lost."""
        figures = self._figures
        lost = figures.training - training_seconds
        # Less than none: metrics.jsonl was not written for a while, so that training was taken for waiting.
        self._figures = Goodput(
            training=training_seconds,
            saving=figures.saving,
            restarting=figures.restarting + self._lap(),
            recomputing=figures.recomputing + max(lost, 0.0),
            waiting=max(figures.waiting + min(lost, 0.0), 0.0),
        )

    def step(self, saving_seconds: float) -> None:
        """All time since the last lap was a step, but for what a save took of it."""
        figures, seconds = self._figures, self._lap()
        saving = min(saving_seconds, seconds)
        self._figures = figures._replace(training=figures.training + seconds - saving, saving=figures.saving + saving)

    @property
    def figures(self) -> Goodput:
        """Up to now; the step under way counts as training."""
        return self._figures._replace(training=self._figures.training + max(self._now() - self._last, 0.0))

    @property
    def training_seconds(self) -> float:
        """Up to the last step."""
        return self._figures.training

    def _lap(self) -> float:
        now = max(self._now(), self._last)
        seconds, self._last = now - self._last, now
        return seconds


def goodput_of(line: Mapping[str, Any]) -> Goodput | None:
    """What a line of metrics.jsonl says of it; None where it says nothing."""
    figures = line.get("goodput")
    try:
        return Goodput(**{part: float(figures[part]) for part in Goodput._fields}) if figures else None
    except (KeyError, TypeError, ValueError):
        return None


def last_goodput(run_dir: Path) -> tuple[Goodput, float] | None:
    """The last in metrics.jsonl, and when it was written; None where there is none."""
    found = [(figures, line["time"]) for line in tail(run_dir) if (figures := goodput_of(line)) and "time" in line]
    return found[-1] if found else None

"""Loss spikes: a step whose loss or gradient norm stands out is found before its update, and skipped or rewound.

The median and the median absolute deviation of the steps before are hardly moved by earlier spikes. A batch is checked
before its update is made, by figures that are the same on every rank.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatrain.config import SpikesConfig
from megatrain.distributed.groups import Groups
from megatrain.parallel.engine import Admit

DEVIATIONS_OF_MAD = 1.4826
"""The standard deviation of a normal distribution, in median absolute deviations."""

LEAST_DEVIATION = {"loss": 0.02, "gradient norm": 0.2}
"""As a share of the median: a loss that has become flat must not make every flicker a spike."""


@dataclass(frozen=True)
class Recent:
    """Loss and gradient norm of the last steps that were updates, oldest first."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def after_step(self, loss: float, norm: float, num_steps: int) -> Recent:
        return Recent((*self.losses, loss)[-num_steps:], (*self.norms, norm)[-num_steps:])

    def spike(self, loss: float, norm: float, rule: SpikesConfig) -> str | None:
        """What spikes in a step with this loss and norm, in words; None: nothing, or too little is known yet."""
        if len(self.losses) < rule.window_steps:
            return None
        figures = {"loss": (loss, self.losses), "gradient norm": (norm, self.norms)}
        found = [text for name, (value, before) in figures.items() if (text := _deviation(name, value, before, rule))]
        return " and ".join(found) or None


NOTHING_YET = Recent()


@dataclass(frozen=True)
class Rewind:
    """The run went back from ``from_step`` to ``to_step`` and left out the batches that the steps from there up to
    ``until_step`` would have read."""

    from_step: int
    to_step: int
    until_step: int
    reason: str

    def text(self) -> str:
        return (
            f"{self.reason}: went back from step {self.from_step} to {self.to_step}; what the steps "
            f"{self.to_step + 1} to {self.until_step} would have read is left out"
        )


class SpikeDetector:
    """Checks each step before its update is made. ``recent``: of the steps before the first."""

    def __init__(self, rule: SpikesConfig, groups: Groups, recent: Recent) -> None:
        self._rule, self._groups = rule, groups
        self.recent = recent
        self.spike: str | None = None
        """What spiked in the last step; None: nothing."""

    def guard(self, num_targets: int) -> Admit | None:
        """What the engine asks before the update of a batch with so many target tokens; None where there is no rule."""
        self.spike = None
        return None if self._rule.action == "none" else partial(self._is_normal, num_targets)

    def _is_normal(self, num_targets: int, loss_sum: float, norm: float) -> bool:
        # Rank 0's norm is everybody's: one that differs in its last bit must not lead to another answer there.
        total, norm = self._groups.all_reduce_sum([loss_sum, norm if self._groups.rank == 0 else 0.0])
        loss = total / num_targets
        self.spike = self.recent.spike(loss, norm, self._rule)
        if self.spike is None:
            self.recent = self.recent.after_step(loss, norm, self._rule.window_steps)
        return self.spike is None


class SpikeError(Exception):
    """Raised on every rank where the rule says to go back. ``step``: the steps that were made before the spike."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


def num_in_a_row(rewinds: Sequence[Rewind]) -> int:
    """How often the run went back to the same step last."""
    count = 0
    while count < len(rewinds) and rewinds[-1 - count].to_step == rewinds[-1].to_step:
        count += 1
    return count


def _deviation(name: str, value: float, before: Sequence[float], rule: SpikesConfig) -> str | None:
    known = [each for each in before[-rule.window_steps :] if math.isfinite(each)]
    if not known:
        return None
    median = statistics.median(known)
    deviation = DEVIATIONS_OF_MAD * statistics.median(abs(each - median) for each in known)
    deviation = max(deviation, LEAST_DEVIATION[name] * abs(median))
    if value <= median + rule.num_deviations * deviation:
        return None
    return f"{name} {value:.4g} (median of the {len(known)} steps before: {median:.4g}, deviation {deviation:.2g})"

"""The factor under which gradients pass backward in half precision: a power of two.

The gradient of a mean is that of the sum times 1 / targets. Rounded to bf16, that factor is wrong by up to 0.4%; and
multiplied in fp32 into values of 8 bits, the products round to one side wherever it lies near half a step. Either way
all gradients of the model are wrong by the same share. A power of two changes exponents alone: no bit is lost. What is
left of the factor is multiplied into the fp32 gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.config import TrainConfig

_SMALLEST = 1.0
_HYSTERESIS = 2  # overflows until the scale is halved


def power_of_two_below(factor: float) -> float:
    """The largest power of two that is not above ``factor``; NaN where that is NaN."""
    mantissa, _ = math.frexp(factor)
    return factor / (2.0 * mantissa)


@dataclass
class DynamicLossScale:
    """fp16's loss scale, as in DeepSpeed: halved at each overflow from the second one on, doubled after ``window``
    updates without one."""

    window: int
    cur_scale: float
    cur_iter: int = 0
    last_overflow_iter: int = -1
    cur_hysteresis: int = _HYSTERESIS

    @classmethod
    def of(cls, train: TrainConfig) -> DynamicLossScale | None:
        """As a run begins with it; None under another precision than fp16."""
        if train.precision != "fp16":
            return None
        return cls(train.loss_scale_window, 2.0**train.initial_loss_scale_power)

    def update(self, *, overflow: bool) -> None:
        """After each step."""
        if overflow:
            if self.cur_hysteresis == 1:
                self.cur_scale = max(self.cur_scale / 2.0, _SMALLEST)
            else:
                self.cur_hysteresis -= 1
            self.last_overflow_iter = self.cur_iter
        else:
            num_since = self.cur_iter - self.last_overflow_iter - 1
            if num_since > 0 and num_since % self.window == 0:
                self.cur_hysteresis = _HYSTERESIS
                self.cur_scale *= 2.0
        self.cur_iter += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {key: float(getattr(self, key)) for key in _STATE}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a state that was saved."""
        for key in state.keys() & set(_STATE):
            setattr(self, key, state[key] if key == "cur_scale" else int(state[key]))


_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def backward_factor(per_target: float, dynamic: DynamicLossScale | None) -> float:
    """The power of two that stands for ``per_target`` in the backward pass, fp16's ``dynamic`` scale included."""
    return power_of_two_below(per_target * (1.0 if dynamic is None else dynamic.cur_scale))

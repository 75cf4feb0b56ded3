"""The factor under which gradients pass backward in half precision: a power of two.

The gradient of a mean is that of the sum times 1 / targets. Rounded to bf16, that factor is wrong by up to 0.4%; and
multiplied in fp32 into values of 8 bits, the products round to one side wherever it lies near half a step. Either way
all gradients of the model are wrong by the same share. A power of two changes exponents alone: no bit is lost. What is
left of the factor is multiplied into the fp32 gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatrain.config import TrainConfig

_SMALLEST = 1.0
_HYSTERESIS = 2  # overflows until the scale is halved


def power_of_two_below(factor: float) -> float:
    """The largest power of two that is not above ``factor``; NaN where that is NaN."""
    mantissa, _ = math.frexp(factor)
    return factor / (2.0 * mantissa)


class DynamicLossScale:
    """fp16's loss scale, as in DeepSpeed: halved at each overflow from the second one on, doubled after ``window``
    updates without one. Its state is kept where gradients are judged, so that nobody waits for the judgement."""

    def __init__(self, window: int, scale: float, device: torch.device) -> None:
        self._window = window
        begun = {"cur_scale": scale, "cur_iter": 0, "last_overflow_iter": -1, "cur_hysteresis": _HYSTERESIS}
        self._state = {key: torch.full((), value, dtype=torch.float64, device=device) for key, value in begun.items()}

    @classmethod
    def of(cls, train: TrainConfig, device: torch.device) -> DynamicLossScale | None:
        """As a run begins with it; None under another precision than fp16."""
        if train.precision != "fp16":
            return None
        return cls(train.loss_scale_window, 2.0**train.initial_loss_scale_power, device)

    @property
    def value(self) -> Tensor:
        """fp32: a power of two."""
        return self._state["cur_scale"].float()

    def update(self, *, overflow: Tensor) -> None:
        """After each step. ``overflow``: a bool, on the device of the state."""
        scale, step, last, hysteresis = self._state.values()
        num_since = step - last - 1
        grows = (num_since > 0) & (num_since % self._window == 0) & ~overflow
        shrinks = overflow & (hysteresis == 1)
        scale = torch.where(shrinks, (scale / 2.0).clamp(min=_SMALLEST), scale)
        hysteresis = hysteresis - (overflow & ~shrinks).double()
        self._state = {
            "cur_scale": torch.where(grows, scale * 2.0, scale),
            "cur_iter": step + 1,
            "last_overflow_iter": torch.where(overflow, step, last),
            "cur_hysteresis": torch.where(grows, float(_HYSTERESIS), hysteresis),
        }

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it. It waits for the device."""
        return {key: float(value) for key, value in self._state.items()}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a state that was saved."""
        for key in state.keys() & self._state.keys():
            self._state[key].fill_(state[key])


def backward_factor(per_target: float, dynamic: DynamicLossScale | None) -> float | Tensor:
    """The power of two that stands for ``per_target`` in the backward pass, fp16's ``dynamic`` scale included."""
    factor = power_of_two_below(per_target)
    return factor if dynamic is None else factor * dynamic.value

"""The factor under which gradients pass backward in half precision: a power of two.

The gradient of a mean is that of the sum times 1 / targets. Rounded to bf16, that factor is wrong by up to 0.4%; and
multiplied in fp32 into values of 8 bits, the products round to one side wherever it lies near half a step. Either way
all gradients of the model are wrong by the same share. A power of two changes exponents alone: no bit is lost. What is
left of the factor is taken off the fp32 gradients, where DeepSpeed's optimizers take off a loss scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, DynamicLossScaler


class ScaledOptimizer(BF16_Optimizer):  # type: ignore[misc]
    """DeepSpeed's optimizer of ZeRO 0 and 1 that sums gradients in fp32, with a loss scale; for fp16 a dynamic one."""

    loss_scaler: DynamicLossScaler | None = None

    def use_dynamic_scale(self, settings: dict[str, Any]) -> None:
        """Scale as DeepSpeed's fp16 ``settings`` say."""
        self.loss_scaler = CreateLossScaler(
            torch.float16, static_loss_scale=0, dynamic_scaling=True, dynamic_loss_args=settings
        )

    def override_loss_scale(self, loss_scale: float) -> None:
        """Under the name that it has in DeepSpeed's other optimizers: multiply losses by it, divide gradients."""
        self.custom_loss_scaler, self.external_loss_scale = True, loss_scale

    def step(self, closure: Any = None) -> None:
        """Update with the unscaled gradients; an overflow leaves the update out and lowers a dynamic scale."""
        if self.external_loss_scale is not None:
            for gradients in self.fp32_groups_gradients_flat:
                gradients.div_(self.external_loss_scale)
        super().step(closure)
        if self.loss_scaler is not None:
            self.loss_scaler.update_scale(self.overflow)


def use_power_of_two(optimizer: Any, per_target: float) -> None:
    """For the next step: a loss times ``per_target`` passes backward as the loss times a power of two.

    In fp16 it is the largest one that is not above ``per_target`` times the dynamic loss scale. DeepSpeed multiplies
    by that when it scales the loss and divides by what it is after the step, twice as much where it has just grown; by
    a scale that is overridden, as here, it does both.
    """
    dynamic = getattr(optimizer, "loss_scaler", None)
    _, exponent = math.frexp(per_target * (1.0 if dynamic is None else dynamic.cur_scale))
    optimizer.override_loss_scale(math.ldexp(0.5, exponent) / per_target)

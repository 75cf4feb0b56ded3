"""The learning rate of each step: a function of the step alone."""

from __future__ import annotations

import math

from megatrain.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """The learning rate of ``step`` (counted from 0) of ``num_steps``.

    It rises linearly over the warm-up, reaching ``peak`` in its last step, then goes down to ``peak * min_lr_ratio`` in
    the last step: along half a cosine (Loshchilov and Hutter 2017), along a line, or, for wsd, along a line over the
    last ``decay_steps`` alone (Hu et al. 2024, MiniCPM); constant stays. inverse_sqrt depends on no last step: with
    n = ``step`` + 1 it is ``peak * sqrt(stable_steps / max(n, stable_steps))`` (Vaswani et al. 2017, whose
    ``stable_steps`` are the warm-up; Raffel et al. 2020, T5, without warm-up).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    low = peak * schedule.min_lr_ratio
    first, last = schedule.warmup_steps, num_steps - 1
    if schedule.type == "constant":
        return peak
    if schedule.type == "inverse_sqrt":
        stable = schedule.stable_steps or schedule.warmup_steps
        return peak * math.sqrt(stable / max(step + 1, stable))
    if schedule.type == "wsd":
        decay = schedule.decay_steps or max(1, num_steps // 5)
        first = max(first, num_steps - decay, 1) - 1
    progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
    if schedule.type == "cosine":
        return low + (peak - low) * (1.0 + math.cos(math.pi * progress)) / 2.0
    return peak + (low - peak) * progress

"""What counts as a spike, and what does not."""

from __future__ import annotations

import pytest

from megatrain.config import SpikesConfig
from megatrain.train.spikes import Recent, Rewind, num_in_a_row

RULE = SpikesConfig(action="skip", window_steps=8, num_deviations=8.0)
LOSSES = (3.0, 2.9, 3.1, 3.0, 2.8, 3.2, 3.0, 2.9)
NORMS = (1.0, 1.4, 0.8, 1.1, 0.9, 1.0, 1.2, 1.0)


def after(*steps: tuple[float, float]) -> Recent:
    recent = Recent()
    for loss, norm in steps:
        recent = recent.after_step(loss, norm, RULE.window_steps)
    return recent


USUAL = after(*zip(LOSSES, NORMS, strict=True))


@pytest.mark.parametrize(("loss", "norm"), [(3.2, 1.4), (0.1, 0.0), (3.9, 1.0), (3.0, 2.5)])
def test_usual_or_lower_values_are_no_spike(loss: float, norm: float) -> None:
    assert USUAL.spike(loss, norm, RULE) is None


def test_a_leap_is_named_with_what_was_usual() -> None:
    assert USUAL.spike(9.0, 1.0, RULE) == "loss 9 (median of the 8 steps before: 3, deviation 0.15)"
    both = USUAL.spike(9.0, 50.0, RULE)
    assert both is not None
    assert both.split(" and ")[1].startswith("gradient norm 50 (median of the 8 steps before: 1,")


def test_nothing_is_judged_before_enough_is_known() -> None:
    assert after(*[(3.0, 1.0)] * 7).spike(1e9, 1e9, RULE) is None
    assert after(*[(3.0, 1.0)] * 8).spike(1e9, 1e9, RULE) is not None


def test_flicker_on_a_flat_loss_is_no_spike() -> None:
    flat = after(*[(2.0, 1.0)] * 8)
    assert flat.spike(2.0 * (1 + 0.02 * 7.9), 1.0, RULE) is None
    assert flat.spike(2.0 * (1 + 0.02 * 8.1), 1.0, RULE) is not None


def test_a_window_forgets_what_is_older() -> None:
    recent = after(*[(9.0, 1.0)] * 50, *zip(LOSSES, NORMS, strict=True))
    assert recent == USUAL


def test_consecutive_returns_to_one_step_are_counted() -> None:
    def back(to: int) -> Rewind:
        return Rewind(30, to, 40, "loss")

    assert num_in_a_row([]) == 0
    assert num_in_a_row([back(10), back(20), back(20)]) == 2
    assert num_in_a_row([back(20), back(20), back(10)]) == 1

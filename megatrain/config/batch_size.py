"""The batch size of each step: one number, or a ramp over the tokens that a run has trained on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

BatchSize: TypeAlias = int | tuple[tuple[int, int], ...]
"""Sequences of a step; or pairs [tokens, sequences]: the size of the steps that begin after so many trained tokens."""


class Phase(NamedTuple):
    """Steps of one batch size: from ``first_step`` on, before which there were ``num_samples_before`` in all."""

    first_step: int
    batch_size: int
    num_samples_before: int


def sizes_of(batch_size: BatchSize) -> tuple[int, ...]:
    """Each size, in the order of the steps."""
    return (batch_size,) if isinstance(batch_size, int) else tuple(size for _, size in batch_size)


def with_sizes(batch_size: BatchSize, change: Callable[[int], int]) -> BatchSize:
    """The same ramp over other sizes."""
    if isinstance(batch_size, int):
        return change(batch_size)
    return tuple((tokens, change(size)) for tokens, size in batch_size)


def phases(batch_size: BatchSize, seq_len: int, first_step: int = 0, tokens_before: int = 0) -> list[Phase]:
    """The phases of a run from ``first_step`` on, before which it trained on ``tokens_before`` tokens.

    A step that begins before an entry's tokens are reached keeps its size: no step is divided.
    """
    entries = ((0, batch_size),) if isinstance(batch_size, int) else batch_size
    found: list[Phase] = []
    step, num_samples = first_step, 0
    for number, (_, size) in enumerate(entries):
        if number + 1 == len(entries):
            found.append(Phase(step, size, num_samples))
        elif (missing := entries[number + 1][0] - tokens_before - num_samples * seq_len) > 0:
            found.append(Phase(step, size, num_samples))
            num_steps = -(-missing // (size * seq_len))
            step, num_samples = step + num_steps, num_samples + num_steps * size
    return found


def phase_at(found: Sequence[Phase], step: int) -> Phase:
    return found[bisect_right(found, step, key=lambda phase: phase.first_step) - 1]


def num_samples_until(found: Sequence[Phase], step: int) -> int:
    """Samples of the steps before ``step``, from the first phase on."""
    phase = phase_at(found, step)
    return phase.num_samples_before + (step - phase.first_step) * phase.batch_size

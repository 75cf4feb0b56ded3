"""Divisors, multiples and limits, for messages that name the nearest legal number."""

from __future__ import annotations

import math

LARGEST_COUNT = 2**53  # beyond it an integer is no longer exact as a double


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def multiples_around(value: int, unit: int) -> list[int]:
    """The multiples of `unit` on both sides of `value`, or `value` alone where it is one; never 0."""
    below = value // unit * unit
    if below == value:
        return [value]
    return [below, below + unit] if below else [unit]


def divisors_around(value: int, number: int) -> list[int]:
    """The divisors of `number` on both sides of `value`, or `value` alone where it is one."""
    all_divisors = divisors(number)
    below = [divisor for divisor in all_divisors if divisor <= value][-1:]
    above = [divisor for divisor in all_divisors if divisor >= value][:1]
    return sorted({*below, *above})

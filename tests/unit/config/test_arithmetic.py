"""The nearest legal numbers that messages name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatrain.config.arithmetic import divisors, divisors_around, multiples_around


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_nearest_numbers_are_those_of_plain_search(value, other):
    assert divisors(value) == [divisor for divisor in range(1, value + 1) if value % divisor == 0]
    below = [multiple for multiple in range(1, value + 1) if multiple % other == 0][-1:]
    above = next(multiple for multiple in range(value, value + other) if multiple % other == 0)
    assert multiples_around(value, other) == sorted({*below, above})
    smaller = [divisor for divisor in range(1, value + 1) if other % divisor == 0][-1:]
    larger = [divisor for divisor in range(value, other + 1) if other % divisor == 0][:1]
    assert divisors_around(value, other) == sorted({*smaller, *larger})

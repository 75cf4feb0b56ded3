"""A search for the nearest legal layout: the fewest keys changed, then the smallest changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatrain.config.arithmetic import divisors, multiples_around
from megatrain.plan.layout import OFFLOADS, Layout, Value

MAX_CHANGES = 4
MAX_CANDIDATES = 8
LESS_PREFERRED = 100.0  # more than any distance

ToFix = Callable[[Layout], tuple[str, ...] | None]


@dataclass(frozen=True)
class Change:
    """One field of a layout set to another value."""

    field: str
    value: Value


def repair(layout: Layout, to_fix: ToFix) -> tuple[Change, ...] | None:
    """The changes of least cost after which `to_fix` has nothing left; None where MAX_CHANGES do not suffice.

    `to_fix` names the fields whose change may help, the best first, or gives None where the layout is good. The search
    deepens one change at a time, so that one changed key is preferred to two; then the better fields, then the
    shorter distance.
    """
    for num_changes in range(1, MAX_CHANGES + 1):
        found = _search(layout, to_fix, num_changes, frozenset())
        if found is not None:
            return found[1]
    return None


def _search(
    layout: Layout, to_fix: ToFix, num_changes: int, changed: frozenset[str]
) -> tuple[float, tuple[Change, ...]] | None:
    """The cheapest way with at most `num_changes` changes to fields not yet changed, and its cost."""
    fields = to_fix(layout)
    if fields is None:
        return 0.0, ()
    if num_changes == 0:
        return None
    best = None
    for preference, field in enumerate(fields):
        if field in changed:
            continue
        for value in candidates(layout, field):
            rest = _search(layout.having(field, value), to_fix, num_changes - 1, changed | {field})
            cost = distance(layout, field, value) + LESS_PREFERRED * preference
            if rest is not None and (best is None or cost + rest[0] < best[0]):
                best = cost + rest[0], (Change(field, value), *rest[1])
    return best


def candidates(layout: Layout, field: str) -> list[Value]:
    """Other values for the field, nearest first."""
    now: Value = getattr(layout, field)
    values: list[Value]
    if field == "tensor":
        values = [*divisors(layout.num_heads)]
    elif field == "pipeline":
        values = [stages for stages in divisors(layout.world_size) if stages <= layout.num_layers]
    elif field == "zero_stage":
        values = [0, 1, 2, 3]
    elif field == "sequence":
        values = [True, False]
    elif field == "offload":
        values = [*OFFLOADS]
    elif field == "micro_batch":
        values = [*divisors(layout.global_batch)]
    elif field == "seq_len":
        values = [v for v in multiples_around(layout.seq_len, layout.tensor) if v <= layout.max_seq_len]
    else:
        values = [*multiples_around(layout.global_batch, layout.micro_batch * (layout.data or 1))]
    others = (value for value in values if value != now)
    return sorted(others, key=lambda value: distance(layout, field, value))[:MAX_CANDIDATES]


def distance(layout: Layout, field: str, value: Value) -> float:
    """How far a value is from the layout's own: doublings of a size, steps of a stage, 1 for a switch."""
    now: Value = getattr(layout, field)
    if isinstance(value, str) and isinstance(now, str):
        return float(abs(OFFLOADS.index(value) - OFFLOADS.index(now)))
    if field in ("zero_stage", "sequence"):
        return float(abs(int(value) - int(now)))
    return abs(math.log2(int(value) / int(now)))

"""How long each part of a step takes on each rank, and which rank stays slower than the others.

Ranks wait for each other in every step, so that most parts take equally long on all of them, however slow one is. What
each does by itself tells them apart: it makes its batches, and, when ranks are compared, a fixed piece of arithmetic.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatrain.distributed.groups import Groups
from megatrain.distributed.probe import arithmetic_seconds
from megatrain.observe.metrics import Spread

PARTS = ("data", "forward_backward", "exchange", "optimizer", "eval", "save", "other")
ARITHMETIC = "arithmetic"
OWN = {"data": "making batches takes", ARITHMETIC: "the same arithmetic takes"}
"""What a rank does by itself, in words."""

SLOW = 1.5
"""A rank is slow whose time is more than so many times the median one."""
LEAST_SHARE = 0.05
"""Of the step: a difference below it holds nobody up."""
NUM_IN_A_ROW = 3
"""Comparisons in which a rank was slow before it is named."""


class Straggler(NamedTuple):
    """A rank that is slow at a part that it does by itself."""

    rank: int
    part: str


class StragglerDetector:
    """Compares the ranks of a run with each other. Every rank has one."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._num_steps = 0
        self._in_a_row: dict[Straggler, int] = {}

    def add(self, parts: Mapping[str, float], num_steps: int) -> None:
        """Seconds of each part of so many steps together."""
        self._num_steps += num_steps
        for part, seconds in parts.items():
            self._sums[part] += seconds

    def compare(self) -> tuple[dict[str, Spread], list[str]]:
        """Seconds a step since the last comparison, by part, and of the arithmetic; what is to be told. Collective."""
        own = [self._sums[part] / max(self._num_steps, 1) for part in PARTS]
        self._sums, self._num_steps = dict.fromkeys(PARTS, 0.0), 0
        device = self._groups.device
        seconds = torch.tensor([*own, arithmetic_seconds(device)], dtype=torch.float64, device=device)
        gathered = torch.empty(self._groups.topology.world_size * len(seconds), dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(gathered, seconds)
        columns = gathered.view(-1, len(seconds)).T.tolist()
        spreads = {part: spread_of(column) for part, column in zip((*PARTS, ARITHMETIC), columns, strict=True)}
        return spreads, self._describe(spreads)

    def _describe(self, spreads: Mapping[str, Spread]) -> list[str]:
        """Of each rank that has become a straggler, or is one no more, what there is to say; the same on all ranks."""
        slow = find_slow(spreads)
        before, self._in_a_row = self._in_a_row, {each: self._in_a_row.get(each, 0) + 1 for each in slow}
        named = [each for each in slow if self._in_a_row[each] == NUM_IN_A_ROW]
        recovered = [each for each, count in before.items() if count >= NUM_IN_A_ROW and each not in slow]
        hosts = self._groups.all_gather_object(socket.gethostname()) if named else []
        texts = []
        for rank, part in named:
            spread = spreads[part]
            texts.append(
                f"rank {rank} on {hosts[rank]} is slower than the others: {OWN[part]} {spread.max:.3g} s there and "
                f"{spread.median:.3g} s on the median rank, in {NUM_IN_A_ROW} comparisons in a row"
            )
        return texts + [f"rank {rank} is no slower than the others any more" for rank, _ in recovered]


def spread_of(values: list[float]) -> Spread:
    """Over ranks: the least, the median (of two in the middle the lower), the most, and the rank that has that."""
    most = max(values)
    return Spread(min(values), statistics.median_low(values), most, values.index(most))


def find_slow(spreads: Mapping[str, Spread]) -> list[Straggler]:
    """The slowest rank at each part that ranks do by themselves, where it holds up the others."""
    step = sum(spreads[part].median for part in PARTS)
    found = []
    for part in OWN:
        spread = spreads[part]
        holds_up = part == ARITHMETIC or spread.max - spread.median > LEAST_SHARE * step
        if holds_up and spread.max > SLOW * spread.median:
            found.append(Straggler(spread.slowest, part))
    return found

"""What a rank gets done, where it stands, and by that which of all ranks holds up the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatrain.distributed.naming import name_ranks

PARTS = ("start", "compile", "data", "forward_backward", "exchange", "eval", "save")
"""Of a step, in their order."""

TRANSFERS = {"start": ("restoring its state", "read"), "save": ("saving", "written")}
"""Parts in which a rank waits for state to be read or written: in words, and what has become of the bytes."""


PATIENCE_SECONDS = {"compile": 1800.0}
"""Beyond the time after which a rank without progress is taken for stuck: of parts in which none can be seen."""


class Activity:
    """Of one rank, as counts that only rise. Raised from any thread, without a lock.

    ``num_batches``: micro-batches that went through this rank's layers, trained on or evaluated, and samples read for
    them. ``num_transfers``: blocks of state written or read, and checkpoints looked at or removed.
    ``transferred_bytes`` of ``total_bytes``: how much of the state that is being saved or restored.
    ``num_elsewhere``: raised for what other ranks got done while this one waited for them.
    """

    def __init__(self) -> None:
        self.step, self.part = 0, "start"
        self.num_batches = self.num_transfers = self.num_elsewhere = 0
        self.transferred_bytes = self.total_bytes = 0

    @property
    def count(self) -> int:
        return self.num_batches + self.num_transfers

    @property
    def progress(self) -> tuple[object, ...]:
        """What changes as long as this rank is not stuck.

        What is written in the background of a step does not count: the step has to get on by itself.
        """
        transfers = self.num_transfers if self.part in TRANSFERS else 0
        return self.step, self.part, self.num_batches, transfers, self.num_elsewhere

    @property
    def patience_seconds(self) -> float:
        return PATIENCE_SECONDS.get(self.part, 0.0)

    @property
    def step_shown(self) -> int:
        """The step under way, counted from 1; in a save, the one whose state is saved."""
        return self.step + (self.part != "save")

    def enter(self, step: int, part: str) -> None:
        self.step, self.part = step, part

    def batch(self) -> None:
        self.num_batches += 1

    def begin_transfer(self, total_bytes: int) -> None:
        """So much state is to be saved, or restored, from here on."""
        self.transferred_bytes, self.total_bytes = 0, total_bytes

    def transfer(self, num_bytes: int = 0) -> None:
        """A block of that is through; or, of no bytes, another piece of such work."""
        self.num_transfers += 1
        self.transferred_bytes += num_bytes

    def elsewhere(self) -> None:
        """Another rank, which this one waits for, got something done."""
        self.num_elsewhere += 1


class Position(NamedTuple):
    """Where a rank stands. Of the state that it saves or restores, ``done_bytes`` of ``total_bytes`` are through."""

    rank: int
    host: str
    step: int
    part: str
    done_bytes: int = 0
    total_bytes: int = 0

    @property
    def order(self) -> tuple[int, int, bool]:
        is_through = self.part not in TRANSFERS or self.done_bytes >= self.total_bytes
        return self.step, PARTS.index(self.part) if self.part in PARTS else len(PARTS), is_through

    def doing(self) -> str:
        if self.part not in TRANSFERS:
            return f"in {self.part} of step {self.step + 1}"
        doing, done = TRANSFERS[self.part]
        return f"{doing}, {self.done_bytes:,} of {self.total_bytes:,} bytes {done},"


def find_stuck(positions: Sequence[Position], silent: Sequence[tuple[int, str]]) -> str:
    """Who holds up the others and at what, in words: those who did not say where they stand, else who is behind.

    ``silent``: rank and host of each.
    """
    if silent:
        return f"the others wait for {name_ranks(silent)}, stopped or gone,"
    if len(positions) == 1:
        return f"{_names(positions)} stands still {positions[0].doing()}"
    last = min(position.order for position in positions)
    behind = [position for position in positions if position.order == last]
    if len(behind) < len(positions):
        return f"the others wait for {_names(behind)} {behind[0].doing()}"
    *_, is_through = last
    cause = "a collective that does not end: the network?" if is_through else "the disk or store does not answer?"
    return f"the others wait for each other {behind[0].doing()} ({cause})"


def _names(positions: Sequence[Position]) -> str:
    return name_ranks((position.rank, position.host) for position in positions)

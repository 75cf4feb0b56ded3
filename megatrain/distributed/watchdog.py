"""When a run stands still: every rank dumps its stacks, and the one that is stuck is named.

A rank moves as it enters another part of a step, and as its activity rises: with each micro-batch, and while it saves
or restores with each block. What is written in the background of a step does not count: the step is to move by itself.

Each rank says in the job's store, every few seconds, where it stands. A rank that has not moved for the timeout dumps
the stacks of its threads into its log. The first two ranks then read where all the others stand, twice: whose beats do
not rise any more is stopped or gone, else who is furthest back is stuck.
"""

from __future__ import annotations

import contextlib
import faulthandler
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import orjson
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from megatrain.distributed.activity import Activity
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.naming import name_ranks

PARTS = ("start", "data", "forward_backward", "exchange", "eval", "save")
"""Of a step, in their order."""

TRANSFERS = {"start": ("restoring its state", "read"), "save": ("saving", "written")}
"""Parts in which a rank waits for state to be read or written: in words, and what has become of the bytes."""

_STORE_PATIENCE_SECONDS = 10.0
_KEY = "megatrain/heartbeat/{}"


class Heartbeat(NamedTuple):
    """Where a rank stands. ``beats`` rise as long as it lives; ``done_bytes`` of ``total_bytes`` are through of
    the state that it saves or restores."""

    rank: int
    host: str
    beats: int
    step: int
    part: str
    done_bytes: int = 0
    total_bytes: int = 0

    @property
    def place(self) -> tuple[int, int, bool]:
        """To be compared with other ranks'."""
        is_through = self.part not in TRANSFERS or self.done_bytes >= self.total_bytes
        return self.step, PARTS.index(self.part) if self.part in PARTS else len(PARTS), is_through

    def doing(self) -> str:
        """What it is at, in words."""
        if self.part not in TRANSFERS:
            return f"in {self.part} of step {self.step + 1}"
        doing, done = TRANSFERS[self.part]
        return f"{doing}, {self.done_bytes:,} of {self.total_bytes:,} bytes {done},"


class Watchdog:
    """Watches this rank, and speaks for all where it is rank 0 or 1. ``on_hang`` gets the report, and has to end it.

    ``activity``: what this rank gets done.
    """

    def __init__(
        self,
        rank: RankInfo,
        timeout_seconds: float,
        log: Path,
        on_hang: Callable[[str], None],
        activity: Activity,
    ) -> None:
        self._rank, self._timeout, self._log, self._on_hang = rank, timeout_seconds, log, on_hang
        self._activity = activity
        self._interval = min(5.0, timeout_seconds / 4)
        self._step, self._part, self._moved = 0, "start", time.monotonic()
        self._ended = threading.Event()
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()

    def enter(self, step: int, part: str) -> None:
        """The rank has moved: it is in ``part`` of ``step`` now."""
        self._step, self._part, self._moved = step, part, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _beat(self) -> None:
        store = self._connect()
        count = 0
        while True:
            _, *place = self._heartbeat(count)
            try:
                store.set(_KEY.format(self._rank.rank), orjson.dumps(place).decode())
            except RuntimeError:  # the store has gone, and rank 0 with it: what waits for them will notice
                return
            count += 1
            if self._ended.wait(self._interval):
                return

    def _heartbeat(self, beats: int) -> Heartbeat:
        done, total = self._activity.transferred_bytes, self._activity.total_bytes
        return Heartbeat(self._rank.rank, socket.gethostname(), beats, self._step, self._part, done, total)

    def _counts(self) -> tuple[int, int, int]:
        """What rises as this rank moves."""
        activity = self._activity
        transfers = activity.num_transfers if self._part in TRANSFERS else 0
        return activity.num_batches, transfers, activity.num_elsewhere

    def _watch(self) -> None:
        counts = self._counts()
        while not self._ended.wait(self._interval / 4):
            before, counts = counts, self._counts()
            if counts != before:
                self._moved = time.monotonic()
            still = time.monotonic() - self._moved
            if still > self._timeout:
                self._dump()
                # All wait for the same one, and dump; the first two look, the others leave the word to them.
                report = self._look() if self._rank.rank < 2 else self._own_report()
                if self._rank.rank >= 2:
                    self._ended.wait(3 * self._interval + _STORE_PATIENCE_SECONDS)
                self._on_hang(report)
                return

    @property
    def _step_shown(self) -> int:
        """The step under way, counted from 1; in a save, the one whose state is saved."""
        return self._step + (self._part != "save")

    def _dump(self) -> None:
        try:
            with self._log.open("a") as file:
                file.write(f"no progress for {self._timeout:.0f} s; the stacks of all threads:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass  # a full disk must not hide the hang

    def _own_report(self) -> str:
        return (
            f"Nothing has moved for {self._timeout:.0f} s (train.hang_timeout_seconds): rank {self._rank.rank} waits "
            f"{self._heartbeat(0).doing()} at step {self._step_shown}. Its stacks are in {self._log}. Start the run "
            "again."
        )

    def _look(self) -> str:
        """Who is stuck, by what all ranks say; rank 0 itself where its store does not answer."""
        found: list[Sequence[Heartbeat]] = []

        def read() -> None:
            with contextlib.suppress(RuntimeError):  # the other rank that looks was first, and all have ended
                store = self._connect()
                found.append(self._read(store))
                time.sleep(2 * self._interval + 1.0)
                found.append(self._read(store))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        reader.join(2 * self._interval + 1.0 + _STORE_PATIENCE_SECONDS)
        stuck = standstill(*found) if len(found) == 2 else "the others wait for rank 0, which does not answer,"
        return (
            f"Nothing has moved for {self._timeout:.0f} s (train.hang_timeout_seconds): {stuck} at step "
            f"{self._step_shown}. The stacks of each rank that could write them are in {self._log.parent}. Start "
            "the run again: it goes on from the newest checkpoint; leave that node out if it happens there again."
        )

    def _read(self, store: Store) -> list[Heartbeat]:
        keys = [_KEY.format(rank) for rank in range(self._rank.world_size)]
        values = store.multi_get(keys)
        return [Heartbeat(rank, *orjson.loads(value)) for rank, value in enumerate(values)]

    def _connect(self) -> TCPStore:
        """A connection of its own: the threads of torch's must not wait for this one, nor this one for them."""
        patience = timedelta(seconds=_STORE_PATIENCE_SECONDS)
        return TCPStore(self._rank.master_addr, self._rank.master_port, is_master=False, timeout=patience)


def standstill(before: Sequence[Heartbeat], after: Sequence[Heartbeat]) -> str:
    """Who stands still and at what, in words, from where each rank stood at two moments."""
    if len(after) == 1:
        return f"{_names(after)} stands still {after[0].doing()}"
    return f"the others wait for {blame(before, after)}"


def blame(before: Sequence[Heartbeat], after: Sequence[Heartbeat]) -> str:
    """Which ranks are stuck, from where each stood at two moments."""
    beats: Mapping[int, int] = {heartbeat.rank: heartbeat.beats for heartbeat in before}
    silent = [heartbeat for heartbeat in after if heartbeat.beats == beats.get(heartbeat.rank)]
    if silent:
        return f"{_names(silent)}, stopped or gone,"
    last = min(heartbeat.place for heartbeat in after)
    behind = [heartbeat for heartbeat in after if heartbeat.place == last]
    if len(behind) < len(after):
        return f"{_names(behind)} {behind[0].doing()}"
    *_, is_through = last
    cause = "a collective that does not end: the network?" if is_through else "the disk or store does not answer?"
    return f"each other {behind[0].doing()} ({cause})"


def _names(ranks: Sequence[Heartbeat]) -> str:
    return name_ranks((heartbeat.rank, heartbeat.host) for heartbeat in ranks)

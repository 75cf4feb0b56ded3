from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatrain.distributed.activity import Activity
from megatrain.distributed.bootstrap import RankInfo, free_port
from megatrain.distributed.watchdog import Heartbeat, Watchdog, blame

TIMEOUT_SECONDS = 0.6


def _beat(rank: int, beats: int, step: int, part: str) -> Heartbeat:
    return Heartbeat(rank, f"node{rank // 2}", beats, step, part)


def test_a_rank_without_heartbeats_is_named_with_host() -> None:
    before = [_beat(rank, 10, 7, "forward_backward") for rank in range(4)]
    after = [_beat(rank, 10 if rank == 3 else 12, 7, "forward_backward") for rank in range(4)]
    assert blame(before, after) == "rank 3 on node1, stopped or gone,"


def test_a_lagging_rank_is_named_with_its_place() -> None:
    before = [_beat(rank, 10, 7, "data" if rank == 1 else "forward_backward") for rank in range(4)]
    after = [heartbeat._replace(beats=12) for heartbeat in before]
    assert blame(before, after) == "rank 1 on node0 in data of step 8"


def test_nobody_is_blamed_where_all_wait_alike() -> None:
    before = [_beat(rank, 10, 7, "exchange") for rank in range(4)]
    after = [heartbeat._replace(beats=12) for heartbeat in before]
    assert "each other in exchange" in blame(before, after)


def test_a_silent_node_is_named_once() -> None:
    before = [Heartbeat(rank, f"node{rank // 8}", 10, 7, "exchange") for rank in range(16)]
    after = [heartbeat._replace(beats=10 if heartbeat.host == "node1" else 12) for heartbeat in before]
    assert blame(before, after) == "8 ranks on node1 (8), stopped or gone,"


def test_the_rank_whose_writing_stands_still_is_named() -> None:
    before = [Heartbeat(rank, "node0", 10, 7, "save", 300 if rank == 2 else 1_000, 1_000) for rank in range(4)]
    after = [heartbeat._replace(beats=12) for heartbeat in before]
    assert blame(before, after) == "rank 2 on node0 saving, 300 of 1,000 bytes written,"
    stuck = [heartbeat._replace(done_bytes=500) for heartbeat in after]
    assert "each other saving, 500 of 1,000 bytes written, (the disk or store" in blame(before, stuck)


@contextmanager
def _watched(tmp_path: Path) -> Iterator[tuple[Watchdog, Activity, list[str]]]:
    """The watchdog of a lone rank, what it is told, and its reports."""
    port, activity, reports = free_port(), Activity(), list[str]()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    rank = RankInfo(0, 1, 0, 1, "test", "127.0.0.1", port)
    watchdog = Watchdog(rank, TIMEOUT_SECONDS, tmp_path / "rank.log", reports.append, activity)
    try:
        yield watchdog, activity, reports
    finally:
        watchdog.close()
        del store


WORK: list[tuple[str, Callable[[Activity], None]]] = [
    ("forward_backward", Activity.batch),
    ("eval", Activity.batch),
    ("save", Activity.transfer),
    ("start", Activity.transfer),
    ("save", Activity.elsewhere),
]


def test_slow_progress_is_no_hang(tmp_path: Path) -> None:
    with ExitStack() as opened:
        watched = [(opened.enter_context(_watched(tmp_path)), *each) for each in WORK]
        for (watchdog, _, _), part, _ in watched:
            watchdog.enter(7, part)
        end = time.monotonic() + 3 * TIMEOUT_SECONDS
        while time.monotonic() < end:
            for (_, activity, _), _, work in watched:
                work(activity)
            time.sleep(TIMEOUT_SECONDS / 6)
        assert [reports for (_, _, reports), _, _ in watched] == [[]] * len(WORK)


def test_background_writing_hides_no_hang_of_a_step(tmp_path: Path) -> None:
    with _watched(tmp_path) as (watchdog, activity, reports):
        watchdog.enter(7, "forward_backward")
        told = threading.Event()
        end = time.monotonic() + 30.0
        while not reports and time.monotonic() < end:
            activity.transfer(1)
            told.wait(0.05)
        assert "stands still in forward_backward of step 8" in reports[0]
        assert "the others" not in reports[0]

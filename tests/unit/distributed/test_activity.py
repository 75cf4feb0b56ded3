"""Who is named where nothing moves, and what counts as a move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatrain.distributed.activity import Activity, Position, find_stuck
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.liveness import LivenessMonitor

TIMEOUT_SECONDS = 0.6


def _at(rank: int, part: str) -> Position:
    return Position(rank, f"node{rank // 2}", 7, part)


def test_a_rank_that_does_not_answer_is_named() -> None:
    answered = [_at(rank, "forward_backward") for rank in range(3)]
    assert find_stuck(answered, [(3, "node1")]) == "the others wait for rank 3 on node1, stopped or gone,"


def test_a_lagging_rank_is_named_with_its_place() -> None:
    positions = [_at(rank, "data" if rank == 1 else "forward_backward") for rank in range(4)]
    assert find_stuck(positions, []) == "the others wait for rank 1 on node0 in data of step 8"


def test_nobody_is_blamed_where_all_wait_alike() -> None:
    assert "each other in exchange" in find_stuck([_at(rank, "exchange") for rank in range(4)], [])


def test_a_silent_node_is_named_once() -> None:
    silent = [(rank, "node1") for rank in range(8, 16)]
    assert "wait for 8 ranks on node1 (8), stopped or gone," in find_stuck([_at(0, "exchange")], silent)


def test_the_rank_whose_writing_stands_still_is_named() -> None:
    positions = [Position(rank, "node0", 7, "save", 300 if rank == 2 else 1_000, 1_000) for rank in range(4)]
    assert "wait for rank 2 on node0 saving, 300 of 1,000 bytes written," in find_stuck(positions, [])
    stuck = [position._replace(done_bytes=500) for position in positions]
    assert "each other saving, 500 of 1,000 bytes written, (the disk or store" in find_stuck(stuck, [])


@contextmanager
def _watched(tmp_path: Path) -> Iterator[tuple[Activity, list[str]]]:
    """What a lone rank gets done, and the reports of its monitor."""
    activity, reports = Activity(), list[str]()
    with LivenessMonitor(RankInfo(0, 1, 0, 1, "test", "127.0.0.1", 1), tmp_path, "start", reports.append) as monitor:
        monitor.watch(activity, TIMEOUT_SECONDS, tmp_path / "rank.log")
        yield activity, reports


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
        for (activity, _), part, _ in watched:
            activity.enter(7, part)
        end = time.monotonic() + 3 * TIMEOUT_SECONDS
        while time.monotonic() < end:
            for (activity, _), _, work in watched:
                work(activity)
            time.sleep(TIMEOUT_SECONDS / 6)
        assert [reports for (_, reports), _, _ in watched] == [[]] * len(WORK)


def test_background_writing_hides_no_hang_of_a_step(tmp_path: Path) -> None:
    with _watched(tmp_path) as (activity, reports):
        activity.enter(7, "forward_backward")
        end = time.monotonic() + 30.0
        while not reports and time.monotonic() < end:
            activity.transfer(1)
            time.sleep(0.05)
        assert "stands still in forward_backward of step 8" in reports[0]
        assert "the others" not in reports[0]
    assert "test_background_writing" in (tmp_path / "rank.log").read_text()

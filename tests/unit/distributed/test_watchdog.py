from __future__ import annotations

from megatrain.distributed.watchdog import Heartbeat, blame


def _beat(rank: int, beats: int, step: int, part: str) -> Heartbeat:
    return Heartbeat(rank, f"node{rank // 2}", beats, step, part)


def test_a_rank_whose_beats_have_stopped_is_named_with_its_host() -> None:
    before = [_beat(rank, 10, 7, "forward_backward") for rank in range(4)]
    after = [_beat(rank, 10 if rank == 3 else 12, 7, "forward_backward") for rank in range(4)]
    assert blame(before, after) == "rank 3 on node1, stopped or gone,"


def test_a_living_rank_that_is_behind_the_others_is_named_with_its_place() -> None:
    before = [_beat(rank, 10, 7, "data" if rank == 1 else "forward_backward") for rank in range(4)]
    after = [heartbeat._replace(beats=12) for heartbeat in before]
    assert blame(before, after) == "rank 1 on node0 in data of step 8"


def test_where_all_wait_in_the_same_place_nobody_is_blamed() -> None:
    before = [_beat(rank, 10, 7, "exchange") for rank in range(4)]
    after = [heartbeat._replace(beats=12) for heartbeat in before]
    assert "each other in exchange" in blame(before, after)


def test_a_node_full_of_silent_ranks_is_named_once() -> None:
    before = [Heartbeat(rank, f"node{rank // 8}", 10, 7, "exchange") for rank in range(16)]
    after = [heartbeat._replace(beats=10 if heartbeat.host == "node1" else 12) for heartbeat in before]
    assert blame(before, after) == "8 ranks on node1 (8), stopped or gone,"

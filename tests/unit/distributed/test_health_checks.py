"""Which rank, node or link the readings of all ranks name, and that they name none where all is well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatrain.distributed.health_checks import Effort, Reading, diagnose

EFFORT = Effort(written_bytes=32 << 20, sent_bytes=16 << 20)
SOFTWARE = {"Python": "3.11.7", "torch": "2.13.0"}


def ring(num_nodes: int, per_node: int = 2, **seconds: float) -> list[Reading]:
    """Healthy ranks, of which those of a node are much closer to each other than nodes are."""
    size = num_nodes * per_node
    readings = []
    for rank in range(size):
        is_far = rank // per_node != (rank + 1) % size // per_node
        own = {"arithmetic": 0.15 + 0.01 * (rank % 3)}
        own |= {"latency": 1e-4, "exchange": 4e-3} if is_far else {"latency": 1e-5, "exchange": 1e-4}
        own |= {"write": 0.1 + 0.02 * (rank % 4)} if rank % per_node == 0 else {}
        readings.append(Reading(rank, f"node{rank // per_node}", SOFTWARE, "H100, 85.9 GB", (), 1e9 + 1e-3 * rank, own))
    return readings


def slower(reading: Reading, **factors: float) -> Reading:
    return replace(reading, seconds={name: value * factors.get(name, 1.0) for name, value in reading.seconds.items()})


def change(readings: list[Reading], rank: int, **changes: object) -> list[Reading]:
    return [replace(each, **changes) if each.rank == rank else each for each in readings]  # type: ignore[arg-type]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 512])
def test_healthy_ranks_give_no_finding(num_nodes):
    assert diagnose(ring(num_nodes), EFFORT) == []


def test_another_version_is_named_and_prevents_the_run():
    [finding] = diagnose(change(ring(3), 4, software={**SOFTWARE, "torch": "2.12.0"}), EFFORT)
    assert finding.text == "rank 4 on node2: torch 2.12.0, where most ranks have torch 2.13.0"
    assert finding.hosts == ("node2",)
    assert finding.is_fatal


def test_another_device_is_named_and_stops_nothing():
    [finding] = diagnose(change(ring(2), 1, device="A100, 42.9 GB"), EFFORT)
    assert finding.text == "rank 1 on node0: A100, 42.9 GB, where most ranks have H100, 85.9 GB"
    assert not finding.is_fatal


def test_problems_reported_by_a_rank_are_passed_on():
    [finding] = diagnose(change(ring(2), 2, problems=("/tmp has 3.15 MB left, less than 268 MB",)), EFFORT)
    assert finding == ("rank 2 on node1: /tmp has 3.15 MB left, less than 268 MB", ("node1",), False)


def test_a_wrong_clock_names_the_node_once():
    readings = [replace(each, clock=each.clock + 30 * (each.host == "node1")) for each in ring(3)]
    [finding] = diagnose(readings, EFFORT)
    assert finding.text == "the clock of node1 is 30 s ahead of the others"


def test_a_throttled_rank_is_named():
    readings = ring(2)
    readings[3] = slower(readings[3], arithmetic=5.0)
    [finding] = diagnose(readings, EFFORT)
    assert finding.text.startswith("rank 3 on node1 computes slowly: 0.75 s for the arithmetic that takes 0.16 s")


def test_a_slow_disk_is_named():
    readings = ring(4)
    readings[6] = slower(readings[6], write=100.0)
    [finding] = diagnose(readings, EFFORT)
    assert finding.text.startswith("node3 writes slowly into the run folder: 14 s for 33.6 MB that take 0.")


def test_a_node_is_named_instead_of_its_links():
    readings = [slower(each, latency=400.0) if each.rank in (3, 5) else each for each in ring(4)]
    [finding] = diagnose(readings, EFFORT)
    assert finding.text == "the network of node2 is slow: 40 ms for a few bytes, 0.1 ms on the median link"
    assert finding.hosts == ("node2",)


def test_one_slow_link_is_named_by_its_ends():
    readings = ring(4)
    readings[3] = slower(readings[3], exchange=50.0)
    [finding] = diagnose(readings, EFFORT)
    assert finding.text == (
        "the link between rank 3 on node1, rank 4 on node2 is slow: 200 ms for 16.8 MB, 4 ms on the median link"
    )
    assert len(finding.hosts) == 1


def test_of_two_nodes_the_link_is_named():
    readings = ring(2)
    readings[1], readings[3] = (slower(readings[rank], latency=500.0) for rank in (1, 3))
    [finding] = diagnose(readings, EFFORT)
    assert "the link between" in finding.text
    assert "50 ms for a few bytes" in finding.text


def test_a_slow_link_within_a_node_is_named():
    readings = ring(2, per_node=8)
    readings[2] = slower(readings[2], exchange=3000.0)
    [finding] = diagnose(readings, EFFORT)
    assert "rank 2 on node0, rank 3 on node0" in finding.text


def test_many_slow_links_are_counted_not_all_named():
    readings = [slower(each, latency=500.0) for each in ring(64)]
    findings = diagnose(readings, EFFORT)
    assert len(findings) == 5
    assert findings[-1].text == "64 of 64 links are slow in all"

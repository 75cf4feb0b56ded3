"""Elastic jobs on nodes of a real SLURM: each start takes the nodes that are left, and the run is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.conftest import ClusterRun
from tests.cluster.test_jobs import acceptance
from tests.runs import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


@acceptance
@pytest.mark.parametrize("via", ["srun", "deepspeed"])
def test_a_lost_node_leaves_a_legal_layout_running(
    via: str, cluster_run: ClusterRun, straight: Callable[[int], Metrics]
) -> None:
    """Of four nodes three are left, and no layout fits those: it goes on with two, and with the same global batches."""
    cluster_run.lab.wait_until_idle()
    cluster_run.submit(via, "--min-nodes", "2", "--exclude", "node5", nodes=4)
    cluster_run.wait_for_step(13)
    cluster_run.lab.crash(2)
    cluster_run.wait_for_restarts(1)
    metrics, expected = cluster_run.finish(), straight(4)
    assert "Elastic: trains on 4 of 4 nodes, 4 rank(s).\n" in cluster_run.output()
    idle = "The layout is not legal on more of them; idle: node4."
    assert f"Elastic: trains on 2 of 3 nodes, 2 rank(s). {idle}\n" in cluster_run.output()
    (resumed,) = cluster_run.events("resume")
    assert resumed >= 10
    assert metrics.steps == expected.steps
    assert metrics.losses[:resumed] == expected.losses[:resumed]
    assert metrics.losses[resumed:] == pytest.approx(expected.losses[resumed:], rel=1e-4)
    assert metrics.norms[resumed:] == pytest.approx(expected.norms[resumed:], rel=1e-4)


@acceptance
@pytest.mark.parametrize("via", ["deepspeed", "srun"])
def test_a_job_grows_from_one_node(via: str, cluster_run: ClusterRun, straight: Callable[[int], Metrics]) -> None:
    cluster_run.lab.wait_until_idle()
    with cluster_run.lab.drained(range(2, 6)):
        cluster_run.submit(via, "--min-nodes", "1", nodes=2)
        cluster_run.wait_for_step(13)
    cluster_run.lab.call("scontrol", "requeue", cluster_run.number)
    metrics, expected = cluster_run.finish(), straight(2)
    assert "trains on 1 of 1 nodes" in cluster_run.output()
    assert "trains on 2 of 2 nodes" in cluster_run.output()
    assert metrics.losses == pytest.approx(expected.losses, rel=1e-4)

"""Jobs on nodes of a real SLURM, disturbed as clusters do: each ends with the losses of a run that nothing disturbed.

The suite marked slow takes a sample; MEGATRAIN_ACCEPTANCE=1 runs all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.cluster.conftest import ClusterRun
from tests.runs import Metrics, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
acceptance = pytest.mark.skipif(os.environ.get("MEGATRAIN_ACCEPTANCE") != "1", reason="part of `make acceptance`")
both_ways = pytest.mark.parametrize("via", ["deepspeed", "srun"])
Check = Callable[[Metrics], None]


@pytest.mark.parametrize("via", ["deepspeed", pytest.param("srun", marks=acceptance)])
def test_a_job_told_of_its_limit_saves_requeues_itself_and_goes_on(
    via: str, cluster_run: ClusterRun, check_same: Check
) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scancel", "--batch", "--signal=USR1", cluster_run.number)  # what --signal=B:USR1@S sends
    check_same(cluster_run.finish())
    assert "state saved: start it again" in cluster_run.output()
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "1"
    assert cluster_run.events("resume") == cluster_run.events("stop")


@pytest.mark.parametrize("via", ["srun", pytest.param("deepspeed", marks=acceptance)])
def test_a_job_whose_rank_is_killed_requeues_itself_and_goes_on(
    via: str, cluster_run: ClusterRun, check_same: Check
) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(13)
    cluster_run.lab.ranks()[-1].send_signal(signal.SIGKILL)
    check_same(cluster_run.finish())
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "1"
    assert cluster_run.events("resume")[0] >= 10


@acceptance
@both_ways
def test_a_job_that_nothing_disturbs_ends_with_0(via: str, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via)
    check_same(cluster_run.finish())
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "0"


@acceptance
@both_ways
def test_a_job_that_is_requeued_by_hand_saves_first(via: str, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scontrol", "requeue", cluster_run.number)
    check_same(cluster_run.finish())
    assert cluster_run.events("resume") == cluster_run.events("stop")


@acceptance
@both_ways
def test_a_job_that_is_cancelled_saves_and_does_not_come_back(via: str, cluster_run: ClusterRun) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scancel", cluster_run.number)
    assert cluster_run.lab.wait_for_job(cluster_run.number) == "CANCELLED"
    wait_until(lambda: not cluster_run.lab.ranks())
    assert cluster_run.events("stop") == Metrics.read(cluster_run.run_dir).steps[-1:]
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "0"


@acceptance
@both_ways
def test_a_job_whose_node_crashes_goes_on_with_another(via: str, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(13)
    cluster_run.lab.crash(2)
    cluster_run.wait_for_restarts(1)
    check_same(cluster_run.finish())
    assert cluster_run.events("resume")[0] >= 10
    cluster_run.lab.boot(2)


@acceptance
@both_ways
def test_the_ranks_of_a_node_that_was_cut_off_commit_nothing(
    via: str, cluster_run: ClusterRun, check_same: Check
) -> None:
    """The first node, with rank 0: its ranks live on while the job goes on elsewhere, and when the node is back."""
    cluster_run.submit(via)
    cluster_run.wait_for_step(13)
    left_behind = cluster_run.lab.ranks()
    cluster_run.lab.cut(1)
    cluster_run.wait_for_restarts(1)
    assert any(rank.is_running() for rank in left_behind)
    wait_until(lambda: bool(cluster_run.events("resume")))
    cluster_run.lab.heal(1)
    check_same(cluster_run.finish())
    wait_until(lambda: not cluster_run.lab.ranks())


@acceptance
@both_ways
def test_what_no_restart_mends_ends_the_job_with_the_first_cause(via: str, cluster_run: ClusterRun) -> None:
    cluster_run.submit(via, "data.validation=[{path: /nowhere}]")
    assert cluster_run.lab.wait_for_job(cluster_run.number) == "FAILED"
    assert cluster_run.lab.job(cluster_run.number)["ExitCode"] == "3:0"
    assert "/nowhere" in cluster_run.output()
    assert "Traceback" not in cluster_run.output()

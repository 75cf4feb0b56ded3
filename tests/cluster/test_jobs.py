"""Jobs on nodes of a real SLURM, disturbed as clusters do: each ends with the losses of a run that nothing disturbed.

The suite marked slow takes a sample; MEGATRAIN_ACCEPTANCE=1 runs all.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import ClusterRun
from tests.runs import Metrics, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
acceptance = pytest.mark.acceptance
both_ways = pytest.mark.parametrize("via", ["deepspeed", "srun"])
Check = Callable[..., None]


def both_ways_and_sizes(*sample: tuple[str, int]) -> pytest.MarkDecorator:
    """Each way to start ranks, on 2 nodes and on 4, of which all but the sample belong to `make acceptance`."""
    cases = [(via, nodes) for nodes in (2, 4) for via in ("deepspeed", "srun")]
    marked = [pytest.param(*case, marks=() if case in sample else acceptance) for case in cases]
    return pytest.mark.parametrize(("via", "nodes"), marked)


@both_ways_and_sizes(("deepspeed", 2))
def test_a_time_limit_saves_requeues_and_resumes(
    via: str, nodes: int, cluster_run: ClusterRun, check_same: Check
) -> None:
    cluster_run.submit(via, nodes=nodes)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scancel", "--batch", "--signal=USR1", cluster_run.number)  # what --signal=B:USR1@S sends
    check_same(cluster_run.finish(), nodes)
    assert "state saved: start it again" in cluster_run.output()
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "1"
    assert cluster_run.events("resume") == cluster_run.events("stop")


@both_ways_and_sizes()
def test_a_killed_rank_requeues_and_resumes(via: str, nodes: int, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via, nodes=nodes)
    cluster_run.wait_for_step(13)
    cluster_run.rank(nodes - 1).send_signal(signal.SIGKILL)
    check_same(cluster_run.finish(), nodes)
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "1"
    assert cluster_run.events("resume")[0] >= 10


@both_ways_and_sizes()
def test_a_job_that_nothing_disturbs_ends_with_0(
    via: str, nodes: int, cluster_run: ClusterRun, check_same: Check
) -> None:
    cluster_run.submit(via, nodes=nodes)
    check_same(cluster_run.finish(), nodes)
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "0"


@both_ways_and_sizes()
def test_a_requeue_by_hand_saves_first(via: str, nodes: int, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via, nodes=nodes)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scontrol", "requeue", cluster_run.number)
    check_same(cluster_run.finish(), nodes)
    assert cluster_run.events("resume") == cluster_run.events("stop")


@acceptance
@both_ways
def test_a_cancelled_job_saves_and_stays_ended(via: str, cluster_run: ClusterRun) -> None:
    cluster_run.submit(via)
    cluster_run.wait_for_step(3)
    cluster_run.lab.call("scancel", cluster_run.number)
    assert cluster_run.lab.wait_for_job(cluster_run.number) == "CANCELLED"
    wait_until(lambda: not cluster_run.ranks())
    assert cluster_run.events("stop") == Metrics.read(cluster_run.run_dir).steps[-1:]
    assert cluster_run.lab.job(cluster_run.number)["Restarts"] == "0"


@both_ways_and_sizes()
def test_a_crashed_node_is_replaced(via: str, nodes: int, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via, nodes=nodes)
    cluster_run.wait_for_step(13)
    cluster_run.lab.crash(2)
    cluster_run.wait_for_restarts(1)
    check_same(cluster_run.finish(), nodes)
    assert cluster_run.events("resume")[0] >= 10


@both_ways_and_sizes()
def test_a_cut_off_node_commits_nothing(via: str, nodes: int, cluster_run: ClusterRun, check_same: Check) -> None:
    """The first node, with rank 0, which stands still before it can see that it has lost the others: it wakes up when
    the job goes on elsewhere, and the node is back.
    """
    cluster_run.submit(via, nodes=nodes)
    cluster_run.wait_for_step(13)
    left_behind = cluster_run.rank(0)
    left_behind.suspend()
    first = int(cluster_run.lab.job(cluster_run.number)["BatchHost"].removeprefix("node"))
    cluster_run.lab.cut(first)
    cluster_run.wait_for_restarts(1)
    wait_until(lambda: len(cluster_run.events("resume")) == 1)
    assert left_behind.is_running()
    left_behind.resume()
    cluster_run.lab.heal(first)
    check_same(cluster_run.finish(), nodes)
    wait_until(lambda: not cluster_run.ranks())


@acceptance
@both_ways
def test_an_unrecoverable_failure_reports_the_first_cause(via: str, cluster_run: ClusterRun) -> None:
    cluster_run.submit(via, "data.validation=[{path: /nowhere}]")
    assert cluster_run.lab.wait_for_job(cluster_run.number) == "FAILED"
    assert cluster_run.lab.job(cluster_run.number)["ExitCode"] == "3:0"
    assert "/nowhere" in cluster_run.output()
    assert "Traceback" not in cluster_run.output()


DIES_AT_ONCE = """
import os, signal, socket, sys
is_rank = sys.orig_argv[-3:-1] == ["-m", "megatrain.train"]
if is_rank and socket.gethostname() == "node2" and "SLURM_RESTART_COUNT" not in os.environ:
    open(os.environ["DIED"], "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@both_ways_and_sizes()
def test_a_rank_dying_at_start_ends_the_others(
    via: str, nodes: int, cluster_run: ClusterRun, check_same: Check, tmp_path: Path
) -> None:
    """Before the others have heard of it: in Python's own start."""
    (tmp_path / "sitecustomize.py").write_text(DIES_AT_ONCE)
    died = tmp_path / "died"
    cluster_run.submit(via, nodes=nodes, PYTHONPATH=str(tmp_path), DIED=str(died))
    wait_until(died.exists)
    cluster_run.wait_for_restarts(1)
    assert time.time() - died.stat().st_mtime < 30
    if via == "deepspeed":
        assert "On node2 the ranks ended, or could not be started" in cluster_run.output()
    check_same(cluster_run.finish(), nodes)

"""What batch scripts promise beyond surviving: real limits, chains, one node, arrays, words and variables as given."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.experiments.runs import summarize
from tests.cluster.conftest import ClusterRun
from tests.cluster.lab import Lab
from tests.cluster.test_jobs import Check, acceptance, both_ways, both_ways_and_sizes
from tests.runs import Metrics, TinyData, tiny_config, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900), acceptance]


@both_ways_and_sizes()
def test_a_real_limit_is_announced_in_time(via: str, nodes: int, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via, "train.steps=1000000", "--time", "2", "--signal-seconds", "60", nodes=nodes)
    cluster_run.wait_for_restarts(1)
    wait_until(lambda: bool(cluster_run.events("resume")))
    cluster_run.wait_for_step(max(100, *cluster_run.events("resume")) + 1)
    assert cluster_run.events("resume") == cluster_run.events("stop")
    check_same(Metrics.read(cluster_run.run_dir), nodes)


def test_a_chain_continues_only_after_a_failed_job(cluster_run: ClusterRun, check_same: Check) -> None:
    first, second, third = cluster_run.submit("srun", "--chain", "3")
    cluster_run.wait_for_step(13)
    cluster_run.ranks()[-1].send_signal(signal.SIGKILL)
    states = [cluster_run.lab.wait_for_job(number) for number in (first, second, third)]
    assert states == ["FAILED", "COMPLETED", "CANCELLED"]
    assert cluster_run.lab.job(first)["ExitCode"] == "5:0"
    check_same(Metrics.read(cluster_run.run_dir))


@both_ways
def test_ranks_bind_to_a_core_each(via: str, cluster_run: ClusterRun, check_same: Check) -> None:
    cluster_run.submit(via, "--cpus-per-task", "1", nodes=1)
    cluster_run.wait_for_step(3)
    cores = [rank.cpu_affinity() for rank in cluster_run.ranks()]
    assert [len(own) for own in cores] == [1, 1]
    assert cores[0] != cores[1]
    check_same(cluster_run.finish())


@both_ways
def test_ranks_get_words_and_variables_unchanged(
    via: str, cluster_run: ClusterRun, check_same: Check, tiny_data: TinyData, tmp_path: Path
) -> None:
    nasty = 'it\'s %n "$(touch broken)" `id` \\ # {x};\nand a second line'
    place = tmp_path / nasty.splitlines()[0]
    place.symlink_to(tiny_data.prose)
    override = f"data.train.0.path='{str(place).replace(chr(39), 2 * chr(39))}'"
    name = 'it\'s "a" \\ name # for {this}'
    cluster_run.submit(via, override, "--cpus-per-task", "1", "--job-name", name, NASTY=nasty)
    assert cluster_run.lab.call("squeue", "-h", "-j", cluster_run.number, "-o", "%j") == name
    cluster_run.wait_for_step(3)
    ranks = cluster_run.ranks()
    assert [rank.environ()["NASTY"] for rank in ranks] == [nasty, nasty]
    assert [rank.cmdline()[-1] for rank in ranks] == [override, override]
    assert {rank.environ()["SLURM_JOB_ID"] for rank in ranks} == {cluster_run.number}
    check_same(cluster_run.finish())
    assert not (cluster_run.run_dir / "logs" / "environment.sh").exists()


def test_the_tasks_of_an_array_train_a_sweep(lab: Lab, tiny_data: TinyData, tmp_path: Path) -> None:
    sections = {"train": {"steps": 2, "eval_batches": 1}, "checkpoint": {"every_steps": 2}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "runs", **sections))
    words = ["sweep", str(config), "optimizer.lr=1e-3,3e-3", "--procs", "1", "--slurm", "--submit"]
    command = [sys.executable, "-m", "megatrain", *words, "--sbatch=--cpus-per-task=1"]
    ended = subprocess.run(command, cwd=tmp_path, env=lab.environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    wait_until(lambda: lab.call("squeue", "-h", "-j", ended.stdout.strip()) == "")
    found = {run.run: (run.state, run.step) for run in summarize(tmp_path / "runs")}
    assert found == {"lr=1e-3": ("finished", 2), "lr=3e-3": ("finished", 2)}

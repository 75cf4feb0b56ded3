"""What jobs are given, and how they are asked for, on nodes of a real SLURM: GPUs (in name), words of sbatch, chains.

The ranks of these jobs do not train: they write down what they were given, and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import ROOT
from tests.cluster.lab import Lab
from tests.runs import TinyData, tiny_config, write_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(300)]
RANK = """
import json, os, pathlib, socket, sys
if sys.orig_argv[-3:-1] == ["-m", "megatrain.train"]:
    sys.path.insert(0, os.getcwd())
    from megatrain.distributed.binding import bind
    from megatrain.distributed.bootstrap import read_rank
    rank = read_rank()
    bind(rank)
    logs = pathlib.Path(os.environ["SEEN"])
    seen = {"world_size": rank.world_size, "host": socket.gethostname(), "environment": dict(os.environ)}
    seen["cores"] = sorted(os.sched_getaffinity(0))
    (logs / f"rank-{rank.rank}.json").write_text(json.dumps(seen))
    os._exit(int(os.environ.get("ENDS_WITH", "0")))
"""


class Desk:
    """Where jobs are submitted whose ranks tell what they were given."""

    def __init__(self, lab: Lab, data: TinyData, folder: Path) -> None:
        self.lab, self.folder, self.run_dir = lab, folder, folder / "run"
        (folder / "sitecustomize.py").write_text(RANK)
        self.config = write_config(folder / "run.yaml", tiny_config(data, self.run_dir))
        self.environment = {**lab.environment, "PYTHONPATH": str(folder), "SEEN": str(folder)}

    def launch(self, *options: str, inside: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess[str]:
        """`megatrain-launch slurm`."""
        command = [*inside, sys.executable, "-m", "launcher", "slurm", str(self.config), *options]
        environment = {**self.environment, **more}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def submit(self, *options: str, inside: tuple[str, ...] = (), **more: str) -> list[str]:
        """The numbers of the jobs."""
        ended = self.launch(*options, "--submit", inside=inside, **more)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.split()

    def ranks(self, job: str) -> list[dict[str, Any]]:
        """What the ranks of a job have seen, which has to end well."""
        assert self.lab.wait_for_job(job) == "COMPLETED", self.output()
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]

    def output(self) -> str:
        """What jobs have printed."""
        return "".join(path.read_text() for path in (self.run_dir / "logs").glob("slurm-*.out"))


@pytest.fixture
def desk(lab: Lab, tiny_data: TinyData, tmp_path: Path) -> Iterator[Desk]:
    lab.wait_until_idle()
    yield Desk(lab, tiny_data, tmp_path)
    subprocess.run(["scancel", f"--user={os.getuid()}"], env=lab.environment, check=False)
    lab.wait_until_idle()


@contextlib.contextmanager
def gpu_taken(lab: Lab) -> Iterator[None]:
    """Somebody else has the first GPU of node1."""
    words = ["--parsable", "--nodelist=node1", "--gpus-per-node=1", "--output=/dev/null", "--wrap", "sleep 600"]
    job = lab.call("sbatch", *words)
    lab.wait_for_job(job, ["RUNNING"])
    yield
    lab.call("scancel", job)


@pytest.mark.parametrize("via", ["srun", "deepspeed"])
def test_ranks_use_the_gpus_that_slurm_gave(via: str, desk: Desk) -> None:
    """Of a node that they share with others: not those that DeepSpeed's launcher would take, from 0 up."""
    with gpu_taken(desk.lab):
        options = ["--nodes", "1", "--gpus-per-node", "1", "--shared", "--sbatch", "--nodelist=node1"]
        (job,) = desk.submit(*options, "--via", via)
        (rank,) = desk.ranks(job)
    assert rank["environment"]["CUDA_VISIBLE_DEVICES"] == "1"
    assert rank["environment"]["MEGATRAIN_DEVICE"] == "cuda"


@pytest.mark.parametrize("via", ["srun", "deepspeed"])
def test_whole_nodes_share_out_gpus_and_cores(via: str, desk: Desk) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")  # those of AWS stores set in this process, too
    secrets = {**dict.fromkeys(names, "x"), "DATABASE": "postgres://me:word@host/x"}
    (job,) = desk.submit("--nodes", "2", "--gpus-per-node", "2", "--via", via, NEEDED="it's", **secrets)
    ranks = desk.ranks(job)
    assert [rank["world_size"] for rank in ranks] == [4] * 4
    hosts = [rank["host"] for rank in ranks]
    assert hosts == sorted(hosts)  # side by side
    assert len(set(hosts)) == 2
    assert desk.lab.job(job)["NumCPUs"] == "4"
    assert {rank["environment"]["CUDA_VISIBLE_DEVICES"] for rank in ranks} == {"0,1"}
    assert {rank["environment"]["NEEDED"] for rank in ranks} == {"it's"}
    nodes = [ranks[place]["cores"] + ranks[place + 1]["cores"] for place in (0, 2)]
    assert [sorted(cores) for cores in nodes] == [sorted(os.sched_getaffinity(0))] * 2
    assert {rank["environment"]["OMP_NUM_THREADS"] for rank in ranks} == {str(len(ranks[0]["cores"]))}
    if via == "deepspeed":
        assert not secrets.keys() & ranks[3]["environment"].keys()
        listed = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, DATABASE, HF_TOKEN"
        assert f"Not passed on over ssh, as they look like secrets: {listed}." in desk.output()
    assert not (desk.run_dir / "logs/environment.sh").exists()


def test_a_job_is_submitted_within_another_job(desk: Desk) -> None:
    """Whose variables say one task on one node, with its memory, which are not the new job's."""
    salloc = ("salloc", "--quiet", "--nodes=1", "--ntasks=1", "--mem-per-cpu=100", "--cpus-per-task=1")
    options = ["--nodes", "2", "--procs-per-node", "1", "--via", "srun", "--cpus-per-task", "2"]
    (job,) = desk.submit(*options, inside=salloc, SLURM_EXPORT_ENV="NONE", RANK="7", MASTER_PORT="1")
    assert [rank["world_size"] for rank in desk.ranks(job)] == [2, 2]


def test_a_printed_script_is_ready_for_sbatch(desk: Desk) -> None:
    """Without the run's folder; and ranks get its variables, whatever the job itself was given."""
    script = desk.launch("--nodes", "1", "--procs-per-node", "2", "--via", "srun", "--sbatch", "--output=/dev/null")
    (desk.folder / "job.sh").write_text(script.stdout)
    assert not desk.run_dir.exists()
    given = {"SEEN": str(desk.folder), "PYTHONPATH": str(desk.folder)}
    export = ",".join(["--export=NIL", *(f"{key}={value}" for key, value in given.items())])
    job = desk.lab.call("sbatch", "--parsable", export, str(desk.folder / "job.sh"))
    ranks = desk.ranks(job)
    assert [rank["environment"]["DS_ACCELERATOR"] for rank in ranks] == ["cpu", "cpu"]
    assert list((desk.run_dir / "logs").glob(f"slurm-{job}.out"))


@pytest.mark.parametrize(("code", "state"), [("3", "FAILED"), ("0", "COMPLETED")])
def test_a_chain_stops_where_nothing_would_change(code: str, state: str, desk: Desk) -> None:
    """Nor do jobs begin which wait for one to fail that was cancelled."""
    options = ["--nodes", "1", "--procs-per-node", "1", "--via", "srun", "--chain", "4"]
    jobs = desk.submit(*options, ENDS_WITH=code)
    assert [desk.lab.wait_for_job(job) for job in jobs] == [state, "CANCELLED", "CANCELLED", "CANCELLED"]
    assert desk.lab.job(jobs[0])["ExitCode"] == f"{code}:0"
    assert [desk.lab.job(job)["RunTime"] for job in jobs[1:]] == ["00:00:00"] * 3
    assert f"The rest of the chain is cancelled: {' '.join(jobs[1:])}." in desk.output()


def test_a_chain_stops_before_ranks_too(desk: Desk) -> None:
    """The config is wrong when the first job begins."""
    options = ["--nodes", "2", "--procs-per-node", "1", "--via", "deepspeed", "--chain", "3"]
    jobs = desk.submit(*options, "--sbatch", "--begin=now+5seconds")
    desk.config.write_text("nothing")
    assert [desk.lab.wait_for_job(job) for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert desk.lab.job(jobs[0])["ExitCode"] == "2:0"


def test_sbatch_says_whether_it_would_take_a_job(desk: Desk) -> None:
    ended = desk.launch("--nodes", "2", "--gpus-per-node", "2", "--test-only")
    assert ended.returncode == 0, ended.stderr
    assert "to start at" in ended.stdout
    ended = desk.launch("--nodes", "2", "--gpus-per-node", "h100:2", "--test-only")
    assert ended.returncode == 2
    assert "refuses the job: " in ended.stderr
    assert not desk.run_dir.exists()


def test_the_doctor_examines_all_gpus_of_an_allocation(desk: Desk) -> None:
    """From where people log in, and beside one task a node: not one rank on each."""
    salloc = ["salloc", "--quiet", "--nodes=2", "--gpus-per-node=2"]
    command = [*salloc, sys.executable, "-m", "launcher", "doctor", "--json", "--folder", str(desk.folder)]
    environment = {**desk.lab.environment, "TORCH_EXTENSIONS_DIR": str(desk.folder / "cache")}
    environment["DS_ACCELERATOR"] = "cpu"  # the lab's GPUs compute nothing
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(ended.stdout)
    assert [reading["host"] for reading in found["readings"]] == ["node1", "node1", "node2", "node2"], ended.stderr
    assert found["exclude"] == []
    gone = {**environment, "SLURM_JOB_ID": "99999", "SLURM_JOB_NODELIST": "node[1-2]"}
    ended = subprocess.run(command[4:], cwd=ROOT, env=gone, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "srun starts no ranks in job 99999: " in ended.stderr
    assert "Invalid job id specified" in ended.stderr
    assert "--exclude" not in ended.stdout + ended.stderr


def test_too_large_an_array_is_refused(desk: Desk) -> None:
    command = [sys.executable, "-m", "launcher", "array", "--tasks", "1002", "--", "sweep", "x"]
    ended = subprocess.run(command, cwd=ROOT, env=desk.environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--tasks 1002: an array of this cluster has 1001 tasks at the most (MaxArraySize)." in ended.stderr

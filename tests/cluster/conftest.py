"""Runs on two or four nodes of a SLURM of five, and the runs that nothing disturbed, to compare with."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.lab import Lab
from tests.runs import Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config

ROOT = Path(__file__).parents[2]
NUM_STEPS = 100
_SECTIONS = {
    "train": {"steps": NUM_STEPS, "global_batch_size": 32, "hang_timeout_seconds": 60.0},
    "checkpoint": {"every_steps": 10},
}


class ClusterRun:
    """A config that trains as a job: one rank on each of its nodes."""

    def __init__(self, lab: Lab, data: TinyData, folder: Path) -> None:
        self.lab, self.run_dir = lab, folder / "run"
        self.config = write_config(folder / "run.yaml", tiny_config(data, self.run_dir, **_SECTIONS))
        self.number = ""

    def submit(self, via: str, *options: str, nodes: int = 2, **environment: str) -> list[str]:
        """Through `megatrain-launch slurm --submit`, one rank a node; two on a single one. The numbers of the jobs, of
        which ours is the first.
        """
        size = ["--nodes", str(nodes), "--procs-per-node", "2" if nodes == 1 else "1"]
        command = [sys.executable, "-m", "launcher", "slurm", str(self.config), *size]
        given = {**self.lab.environment, "OMP_NUM_THREADS": "1", **environment}
        command += ["--via", via, *options, "--submit"]
        ended = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        self.number, *rest = ended.stdout.split()
        return [self.number, *rest]

    def wait_for_step(self, step: int) -> None:
        """Until a step has been logged."""
        wait_until(lambda: step in Metrics.read(self.run_dir).steps or self._has_ended(), 0.05)
        assert step in Metrics.read(self.run_dir).steps, self.output()

    def wait_for_restarts(self, count: int) -> None:
        """Until the job has been requeued so often."""
        wait_until(lambda: self.lab.job(self.number)["Restarts"] == str(count) or self._has_ended(), 0.2)
        assert self.lab.job(self.number)["Restarts"] == str(count), self.output()

    def rank(self, number: int) -> psutil.Process:
        """One of the run's ranks, which is up."""
        ranks = {}
        for rank in self.ranks():
            environ = rank.environ()
            ranks[environ.get("RANK") or environ["SLURM_PROCID"]] = rank  # as deepspeed says it, as srun does
        return ranks[str(number)]

    def ranks(self) -> list[psutil.Process]:
        """The run's ranks that are up."""
        return [rank for rank in self.lab.ranks() if str(self.config) in rank.cmdline()]

    def finish(self) -> Metrics:
        """Until the job has ended well; what it logged."""
        state = self.lab.wait_for_job(self.number)
        assert state == "COMPLETED", f"{state}\n{self.output()}"
        return Metrics.read(self.run_dir)

    def output(self) -> str:
        """What the job has printed, all starts of it."""
        return "".join(path.read_text(errors="replace") for path in (self.run_dir / "logs").glob("slurm-*.out"))

    def events(self, name: str) -> list[int]:
        """The steps at which something was noted, such as "resume"."""
        return [event["step"] for event in Metrics.read(self.run_dir).events if event["event"] == name]

    def _has_ended(self) -> bool:
        return self.lab.job(self.number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture
def cluster_run(lab: Lab, tiny_data: TinyData, tmp_path: Path) -> Iterator[ClusterRun]:
    run = ClusterRun(lab, tiny_data, tmp_path)
    yield run
    if run.number:
        subprocess.run(["scancel", "--full", "--signal=KILL", run.number], env=lab.environment, check=False)
        subprocess.run(["scancel", run.number], env=lab.environment, check=False)
        for process in lab.ranks():
            process.send_signal(signal.SIGKILL)
        lab.mend()


@pytest.fixture(scope="session")
def straight(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Metrics]:
    """What so many ranks on one machine log, undisturbed."""

    @functools.cache
    def train(num_ranks: int) -> Metrics:
        folder = tmp_path_factory.mktemp("straight")
        config = write_config(folder / "run.yaml", tiny_config(tiny_data, folder / "run", **_SECTIONS))
        code, output = TrainProcess(config, num_ranks).wait()
        assert code == 0, output
        return Metrics.read(folder / "run")

    return train


@pytest.fixture
def check_same(straight: Callable[[int], Metrics]) -> Callable[..., None]:
    """Checks that a run logged what as many ranks do, undisturbed, to the last bit (as far as that goes)."""

    def check(metrics: Metrics, num_ranks: int = 2) -> None:
        expected = straight(num_ranks)
        assert metrics.steps[:NUM_STEPS] == list(range(1, NUM_STEPS + 1))
        assert metrics.losses[:NUM_STEPS] == expected.losses
        assert metrics.norms[:NUM_STEPS] == expected.norms

    return check

"""`megatrain-launch doctor` on three nodes: silent where all is well, else it names the bad node, rank or link."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatrain.distributed.health_checks import RESULT
from tests.cluster.conftest import ROOT
from tests.cluster.lab import Lab
from tests.faults.test_stragglers import throttle
from tests.runs import ACCEPTANCE

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(300)]
acceptance = pytest.mark.acceptance
NODES = range(1, 4)  # of the lab
RATE = ("rate", "20mbit", "burst", "32kbit", "latency", "400ms")


class Clinic:
    """Calls the doctor on node1, for three nodes of a lab."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"node{node} slots=1\n" for node in NODES))
        (folder / "run").mkdir()

    def call(self, *launcher: str) -> tuple[int, str]:
        """Its exit code, and what it says; it must not take a minute."""
        command = [*launcher, sys.executable, "-m", "launcher", "doctor", "--folder", str(self.folder / "run")]
        command += [] if launcher else ["--hostfile", str(self.hostfile)]
        environment = {**self.lab.environment, "TORCH_EXTENSIONS_DIR": str(self.folder / "cache")}
        began = time.monotonic()
        ended = subprocess.run(
            self.lab.inside(1, *command), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert time.monotonic() - began < 60
        assert RESULT not in ended.stdout
        return ended.returncode, ended.stdout + ended.stderr

    @contextlib.contextmanager
    def traffic(self, node: int, *qdiscs: tuple[str, ...]) -> Iterator[None]:
        """Shape what a node sends."""
        for words in qdiscs:
            subprocess.run(self.lab.inside(node, "tc", *words[:2], "dev", "eth0", *words[2:]), check=True)
        yield
        subprocess.run(self.lab.inside(node, "tc", "qdisc", "del", "dev", "eth0", "root"), check=True)


@pytest.fixture
def clinic(lab: Lab, tmp_path: Path) -> Clinic:
    return Clinic(lab, tmp_path)


def test_on_healthy_nodes_it_is_silent(clinic: Clinic) -> None:
    for _ in range(5 if ACCEPTANCE else 1):
        assert clinic.call() == (0, "")
    assert list((clinic.folder / "run").iterdir()) == []


def test_a_node_that_sends_slowly_is_named(clinic: Clinic) -> None:
    with clinic.traffic(2, ("qdisc", "add", "root", "tbf", *RATE)):
        code, words = clinic.call()
    assert code == 5
    assert words.startswith("the network of node2 is slow: "), words
    assert words.endswith("Leave out what is bad: --exclude=node2\n")


@acceptance
def test_one_slow_link_is_named_by_its_ends(clinic: Clinic) -> None:
    """Only what node2 sends to node3 is slow."""
    hosts = dict(line.split()[::-1] for line in (clinic.lab.folder / "hosts").read_text().splitlines())
    fast, slow = ("htb", "rate", "10gbit"), ("htb", "rate", "20mbit")
    with clinic.traffic(
        2,
        ("qdisc", "add", "root", "handle", "1:", "htb", "default", "10"),
        ("class", "add", "parent", "1:", "classid", "1:10", *fast),
        ("class", "add", "parent", "1:", "classid", "1:20", *slow),
        (
            "filter",
            "add",
            "parent",
            "1:",
            "protocol",
            "ip",
            "u32",
            "match",
            "ip",
            "dst",
            hosts["node3"],
            "flowid",
            "1:20",
        ),
    ):
        code, words = clinic.call()
    assert code == 5
    assert words.startswith("the link between rank 1 on node2, rank 2 on node3 is slow: ")


@acceptance
def test_a_throttled_rank_is_named(clinic: Clinic) -> None:
    ended = threading.Event()

    def throttle_rank_1() -> None:
        while not ended.is_set():
            for process in psutil.process_iter(["cmdline"]):
                if "-m" in (line := process.info["cmdline"] or []) and "megatrain.distributed.doctor" in line:
                    with contextlib.suppress(psutil.Error):
                        if process.environ().get("RANK") == "1":
                            throttle(process, ended, 0.1)
            time.sleep(0.1)

    thread = threading.Thread(target=throttle_rank_1)
    thread.start()
    try:
        code, words = clinic.call()
    finally:
        ended.set()
        thread.join()
    assert code == 5
    assert words.startswith("rank 1 on node2 computes slowly: ")
    assert words.endswith("--exclude=node2\n")


@acceptance
def test_a_node_without_space_is_named(clinic: Clinic) -> None:
    cache = clinic.folder / "cache"
    cache.mkdir()
    subprocess.run(clinic.lab.inside(3, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(cache)), check=True)
    try:
        code, words = clinic.call()
    finally:
        subprocess.run(clinic.lab.inside(3, "umount", str(cache)), check=True)
    assert code == 5
    assert words.startswith(f"rank 2 on node3: {cache} has 1.05 MB left, less than 268 MB\n")


@acceptance
def test_an_unshared_run_folder_is_named(clinic: Clinic) -> None:
    run = clinic.folder / "run"
    subprocess.run(clinic.lab.inside(3, "mount", "-t", "tmpfs", "none", str(run)), check=True)
    try:
        code, words = clinic.call()
    finally:
        subprocess.run(clinic.lab.inside(3, "umount", str(run)), check=True)
    assert code == 5
    assert words.startswith(f"rank 2 on node3: {run} is not the folder that rank 0 sees: put it on shared storage\n")


@acceptance
def test_a_cut_off_node_is_named_others_examined(clinic: Clinic) -> None:
    clinic.lab.cut(3)
    try:
        code, words = clinic.call()
    finally:
        clinic.lab.heal(3)
    assert code == 5
    assert words.startswith("node3 cannot be reached: ")
    assert words.count("\n") == 2


@acceptance
def test_within_slurm_it_examines_the_job_nodes(clinic: Clinic) -> None:
    clinic.lab.wait_until_idle()
    assert clinic.call("salloc", "--quiet", "--nodes=3", "--ntasks-per-node=1") == (0, "")

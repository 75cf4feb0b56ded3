"""SIGKILL at any step of dedup and filter, or of a worker in any stage, and every executor: the same bytes."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.test_executors import dask_cluster, mpirun, start
from tests.faults.test_executors import run as launch
from tests.faults.tokenize_inputs import environment, folder_bytes, write_inputs
from tests.runs import ACCEPTANCE, wait_until

KILLS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data_tools.clean.dedup import DedupOptions, dedup
from data_tools.clean.filter import choose_filters, filter_documents
from data_tools.clean.split import split
from data_tools.job import Effort
from data_tools.units import ReadOptions
from tests.faults.forked_kills import print_exit_codes
import rensa, fsspec, zstandard, pyarrow.parquet

_, command, out, *steps = sys.argv

def work():
    effort = Effort(1, lambda *_: nullcontext(lambda n: None), 40_000)
    read = ReadOptions(whole_records=True)
    if command == "filter":
        filter_documents(["in"], Path(out), read, choose_filters("length,gopher_repetition", None), effort, False)
    elif command == "split":
        split(["in"], 0.3, Path(out), DedupOptions(read, "minhash", num_permutations=32), effort, False)
    else:
        dedup(["in"], Path(out), DedupOptions(read, command, num_permutations=32), effort, False)

print_exit_codes(work, out, steps)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean-kills")
    write_inputs(folder / "in", 1)
    return folder


def run(folder: Path, command: str, out: str, *steps: int) -> list[int]:
    """The exit codes of runs, each killed at its step; 0 for one that has fewer."""
    arguments = [sys.executable, "-c", KILLS, command, out, *map(str, steps)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), stdout=subprocess.PIPE, check=True, text=True, timeout=280
    )
    return [int(line) for line in done.stdout.split()]


KILLS_IN_ALL = 200 if ACCEPTANCE else 12


@pytest.mark.parametrize(
    "command",
    [
        "minhash",
        pytest.param("exact", marks=pytest.mark.slow),
        pytest.param("filter", marks=pytest.mark.slow),
        pytest.param("split", marks=pytest.mark.slow),
    ],
)
def test_sigkill_at_any_step_changes_no_byte(command: str, folder: Path) -> None:
    assert run(folder, command, f"{command}-whole", 10**9) == [0]
    expected = folder_bytes(folder / f"{command}-whole")
    drawn = random.Random(command)
    steps = [drawn.randrange(1, 60) for _ in range(KILLS_IN_ALL)]
    codes = run(folder, command, f"{command}-killed", *steps, 10**9)
    assert codes.count(-signal.SIGKILL) >= 4
    assert codes[-1] == 0
    assert folder_bytes(folder / f"{command}-killed") == expected


SCRIPT = """
from data_tools import units
units.PART_BYTES = 4000
from data_tools.clean import attributes, dedup
attributes.TASK_BYTES, attributes.READER_CHUNKS = 20_000, 1
dedup.MAX_RUN_DOCUMENTS, dedup.SLICE_DOCUMENTS = 100, 200
from data_tools.cli import main

if __name__ == "__main__":
    main()
"""
MINHASH = ("dedup", "in", "--method", "minhash", "--num-permutations", "32")
COMMANDS: dict[str, tuple[str, ...]] = {
    "exact": ("dedup", "in"),
    "minhash": MINHASH,
    "representative": (*MINHASH, "--cluster-by", "representative"),
    "filter": ("filter", "in", "--filters", "length,gopher_repetition"),
}


def clean_command(folder: Path, name: str, out: str, *options: str) -> list[str]:
    """The command, in parts so small that there are many of them."""
    (folder / "clean.py").write_text(SCRIPT)
    return [sys.executable, str(folder / "clean.py"), *COMMANDS[name], "--out", out, *options]


def by_shares(command: list[str], folder: Path) -> None:
    """As two machines do it that know nothing of each other, stage by stage, until there is a report."""
    for _ in range(11):
        tasks = [start([*command, "--share", f"{number}/2", "--workers", "1"], folder) for number in (2, 1)]
        assert [task.wait(timeout=200) for task in tasks] == [0, 0]
    assert (folder / command[command.index("--out") + 1] / ".report" / "report.json").exists()
    assert launch(command, folder).returncode == 0


def by_ranks(command: list[str], folder: Path) -> None:
    ended = launch(mpirun(4, command), folder)
    assert (ended.returncode, ended.stdout.count("Kept:")) == (0, 1), ended.stderr


def by_dask(command: list[str], folder: Path) -> None:
    with dask_cluster(folder, 3) as (file, _):
        ended = launch([*command, "--dask", file], folder)
        assert ended.returncode == 0, ended.stderr


def by_workers(command: list[str], folder: Path) -> None:
    ended = launch([*command, "--workers", "4"], folder)
    assert ended.returncode == 0, ended.stderr


EXECUTORS: dict[str, Callable[[list[str], Path], None]] = {
    "4 workers": by_workers,
    "shares": by_shares,
    "4 MPI ranks": by_ranks,
    "3 Dask workers": by_dask,
}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, bytes]]:
    """What one process makes of each command."""
    for name in COMMANDS:
        ended = launch(clean_command(folder, name, f"{name}-alone", "--workers", "1"), folder)
        assert ended.returncode == 0, ended.stderr
    return {name: folder_bytes(folder / f"{name}-alone") for name in COMMANDS}


# Every command under one executor, and one command under every executor; the rest is left to acceptance.
EVERY = [(executor, name) for executor in EXECUTORS for name in COMMANDS]
SAMPLED = {("4 workers", "exact"), ("shares", "filter"), ("4 MPI ranks", "representative")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "name"),
    [
        pytest.param(*case, marks=() if case in SAMPLED or case[1] == "minhash" else pytest.mark.acceptance)
        for case in EVERY
    ],
)
def test_every_executor_cleans_to_the_same_bytes(
    executor: str, name: str, folder: Path, alone: dict[str, dict[str, bytes]]
) -> None:
    out = f"{name}-{executor}".replace(" ", "-")
    EXECUTORS[executor](clean_command(folder, name, out), folder)
    assert folder_bytes(folder / out) == alone[name]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["attributes", "runs", "pairs", "lists", "files"])
def test_a_killed_worker_changes_no_byte(stage: str, folder: Path, alone: dict[str, dict[str, bytes]]) -> None:
    out = f"killed-in-{stage}"
    command = clean_command(folder, "minhash", out, "--workers", "2")
    process = start(command, folder)

    def begun() -> bool:
        return process.poll() is not None or any((folder / out / ".work").glob(f"**/{stage}/**/[!.]*.*"))

    wait_until(begun)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    assert process.wait(timeout=100) in ((5, 0) if workers else (0,))  # 0: they had done all by then
    assert launch(command, folder).returncode == 0
    assert folder_bytes(folder / out) == alone["minhash"]

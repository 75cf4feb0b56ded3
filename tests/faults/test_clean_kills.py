"""SIGKILL at any step of dedup, filter and split: the same command ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.tokenize_inputs import environment, folder_bytes, write_inputs
from tests.runs import ACCEPTANCE

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


@pytest.mark.sample(1)
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

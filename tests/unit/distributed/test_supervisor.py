"""The command starts ranks by itself: what they are told, who ends whom, and which exit code is the command's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.distributed import local_ranks
from megatrain.distributed.signals import handlers_restored
from megatrain.distributed.supervisor import launch

WITHOUT_TORCH = """
import sys
from pathlib import Path
from megatrain.distributed import local_ranks
from megatrain.distributed.supervisor import launch
local_ranks.TRAINER = "tests.unit.distributed.small_rank"
code = launch(sys.argv[1], [], 2, Path(sys.argv[1]) / "run", has_gpu=False)
print(code, [name for name in ("torch", "deepspeed", "numpy", "pyarrow") if name in sys.modules])
"""


@pytest.fixture(autouse=True)
def small_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(local_ranks, "TRAINER", "tests.unit.distributed.small_rank")
    with handlers_restored():
        yield


def start(folder: Path, *roles: str, num_ranks: int = 2) -> int:
    return launch(str(folder), roles, num_ranks, folder / "run", has_gpu=False)


def test_each_rank_is_told_its_number(tmp_path: Path) -> None:
    assert start(tmp_path, num_ranks=3) == 0
    told = [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)]
    assert told == [repr((rank, 3, rank, 3, "127.0.0.1")) for rank in range(3)]


def test_the_first_cause_counts_and_others_end(tmp_path: Path) -> None:
    assert start(tmp_path, "0=wait", "1=3") == 3
    assert (tmp_path / "rank-0.told").exists()
    assert not (tmp_path / "rank-1.told").exists()


def test_a_killed_rank_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, "0=wait", "1=kill") == 5
    assert "A rank was killed (SIGKILL). Start the run again" in capfd.readouterr().err


def test_the_command_that_starts_ranks_loads_no_torch(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.strip() == "0 []", ended.stderr

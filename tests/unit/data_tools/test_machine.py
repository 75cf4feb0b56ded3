"""How many cores and how much memory a process counts on: what it is bound to, and what its control groups allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools import machine


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("300000 100000", 3), ("250000 100000", 3), ("1 1000", 1)]
)
def test_the_quotas_of_all_groups_bound_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control groups are files of a folder: to make real ones takes rights that few machines of tests have."""
    (tmp_path / "own").write_text("4:cpu:/old\n0::/slice/job/step\n")
    (tmp_path / "slice" / "job" / "step").mkdir(parents=True)
    (tmp_path / "slice" / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "slice" / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slice" / "job" / "memory.max").write_text("123456789\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert machine.num_cores() == cores
    assert machine.cores_bound().startswith("those" if cores == 8 else "cpu.max")
    assert machine.num_cores(num_processes=16) == 1
    assert machine.memory_bytes() == 123456789


def test_this_machine_has_cores_and_memory() -> None:
    assert 1 <= machine.num_cores() <= (os.cpu_count() or 1)
    assert machine.memory_bytes() > 1 << 28

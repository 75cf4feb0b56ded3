"""What is here to plan for; the files by which Linux and a driver tell are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.plan import this_machine
from megatrain.plan.cluster import Cluster
from megatrain.plan.this_machine import cpu_computes_bf16, device_here

DRIVER = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 193\n"


def test_the_driver_names_the_gpu(tmp_path: Path) -> None:
    assert device_here(tmp_path) == "cpu"
    folder = tmp_path / "proc/driver/nvidia/gpus/0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(DRIVER)
    assert Cluster.of(1, 1, device_here(tmp_path), 400.0, 0.5).device.name == "h100"


@pytest.mark.parametrize(
    ("cpuinfo", "computes"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("something else\n", True),
    ],
)
def test_linux_tells_whether_a_cpu_computes_bf16(cpuinfo: str, computes: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_computes_bf16(tmp_path / "cpuinfo") is computes
    assert cpu_computes_bf16(tmp_path / "gone")


def test_ranks_share_the_cpu_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "_BUDGET_SECONDS", 0.05)
    one, four = (Cluster.of(1, ranks, "cpu", 400.0, 0.5).device for ranks in (1, 4))
    assert 1e8 < one.single_flops < 1e14
    assert four.memory_bytes == one.memory_bytes / 4

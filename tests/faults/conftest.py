"""Copies of the finished run, for tests to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.runs import Metrics, TinyData, finished_config, write_config


class Copy(NamedTuple):
    """A run folder of its own, and a config that trains there."""

    run_dir: Path
    config: Path

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.run_dir / "checkpoints" / f"step-{step:08d}"


@pytest.fixture
def copy_run(tiny_data: TinyData, finished_run: Path, tmp_path: Path) -> Callable[[], Copy]:
    def copy() -> Copy:
        run_dir = tmp_path / "run"
        shutil.copytree(finished_run, run_dir)
        return Copy(run_dir, write_config(tmp_path / "run.yaml", finished_config(tiny_data, run_dir)))

    return copy


@pytest.fixture(scope="session")
def losses(finished_run: Path) -> list[float]:
    return Metrics.read(finished_run).losses

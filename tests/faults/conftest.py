"""Copies of the finished run, for tests to damage; and input for the data tools, with what one process makes of it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.data_jobs import JobFolder, by_workers
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


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    return JobFolder.make(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def alone(job_folder: JobFolder) -> Callable[[str], dict[str, bytes]]:
    """What one process makes of a command of the data tools."""

    @functools.cache
    def make(name: str) -> dict[str, bytes]:
        by_workers(job_folder, name, f"{name} alone", 1)
        return job_folder.made(f"{name} alone")

    return make

"""A finished run of six steps with three checkpoints, made once; tests damage copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks


class Copy(NamedTuple):
    """A run folder of its own, and a config that trains there."""

    run_dir: Path
    config: Path

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.run_dir / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="session")
def finished_run(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, ZeRO 1, checkpoints after steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    two_ranks.finish(write_config(run_dir.parent / "run.yaml", _config(tiny_data, run_dir)))
    return run_dir


@pytest.fixture
def copy_run(tiny_data: TinyData, finished_run: Path, tmp_path: Path) -> Callable[[], Copy]:
    def copy() -> Copy:
        run_dir = tmp_path / "run"
        shutil.copytree(finished_run, run_dir)
        return Copy(run_dir, write_config(tmp_path / "run.yaml", _config(tiny_data, run_dir)))

    return copy


@pytest.fixture(scope="session")
def losses(finished_run: Path) -> list[float]:
    return Metrics.read(finished_run).losses


def _config(data: TinyData, run_dir: Path) -> dict[str, object]:
    return tiny_config(data, run_dir, train={"steps": 6}, checkpoint={"every_steps": 2})

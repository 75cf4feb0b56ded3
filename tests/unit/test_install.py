"""megatrain as a wheel, and as a checkout that is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.runs import TinyData, tiny_config, write_config

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("megatrain", "data_tools", "launcher")


def run(folder: Path, *command: object, **environment: str) -> str:
    words = list(map(str, command))
    ended = subprocess.run(words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in (*PACKAGES, "configs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    run(tmp_path, *pip, "--target", installed, source)
    shutil.rmtree(source)
    command = (sys.executable, "-m", "megatrain", "check", "llama_8b_64xh100", "--nodes", 8, "--gpus-per-node", 8)
    shown = run(tmp_path, *command, PYTHONPATH=str(installed))
    assert shown.startswith("llama_8b_64xh100 is right on 64 rank(s)")
    assert (installed / "bin" / "megatrain-launch").exists()


@pytest.fixture
def without_megatrain(tmp_path: Path) -> Path:
    """A Python that has all that this one has installed, but for megatrain and its metadata."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "megatrain" not in path.name and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    venv.create(tmp_path / "venv", symlinks=True)
    (found,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (found / "packages.pth").write_text(f"{packages}\n")
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.slow
def test_a_checkout_runs_uninstalled(without_megatrain: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run", train={"steps": 2})
    python, written = without_megatrain, write_config(tmp_path / "run.yaml", config)
    for package in PACKAGES:
        assert "Usage" in run(REPOSITORY, python, "-m", package, "--help")
    run(REPOSITORY, python, "-m", "megatrain", "train", written, "--procs", 2)
    run(REPOSITORY, python, "-m", "megatrain", "checkpoint", "verify", tmp_path / "run")

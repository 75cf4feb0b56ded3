"""Ranks that are not alike, or have nowhere to write, are named before the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.distributed.bootstrap import free_port
from megatrain.distributed.health_checks import RESULT
from tests.runs import TinyData, tiny_config, write_config


@pytest.mark.slow
def test_a_rank_with_another_version_prevents_training(tiny_data: TinyData, tmp_path: Path) -> None:
    other = tmp_path / "site" / "numpy-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train={"steps": 2}))
    port = str(free_port())
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in place.items()}
        environment |= {"PYTHONPATH": str(other.parent)} if rank == 1 else {}
        command = [sys.executable, "-m", "megatrain.train", str(config)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [5, 5]
    assert "rank 1 on " in "".join(errors)
    assert "numpy 1.0, where others have numpy 2" in "".join(errors)
    assert "".join(errors).count("Make them the same on all nodes") == 1
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_doctor_of_one_rank_names_unwritable_folders() -> None:
    command = [sys.executable, "-m", "megatrain.distributed.doctor", "/proc"]
    ended = subprocess.run(
        command, env={**os.environ, "MASTER_PORT": str(free_port())}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 5, ended.stderr
    answer = json.loads(ended.stdout.partition(RESULT)[2])
    assert [text for text, _, _ in answer["findings"] if "/proc cannot be written" in text]
    assert answer["readings"][0]["seconds"].keys() == {"arithmetic"}

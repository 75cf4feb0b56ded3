"""What a rank does not load for a whole run of two steps: each costs every rank of every start tenths of a second."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.distributed.bootstrap import free_port
from tests.runs import TinyData, tiny_config, write_config

RANK = "import sys; from megatrain.train.__main__ import main; main(sys.argv[1:]); print(*sys.modules, sep='\\n')"
NEEDLESS = (
    "boto3",
    "datasets",
    "matplotlib",
    "mlflow",
    "pandas",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
)


@pytest.mark.slow
def test_a_rank_loads_no_more_than_needed(tiny_data: TinyData, tmp_path: Path) -> None:
    """No compiler above all, which torch's optimizers load to say that it is not to compile them."""
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train={"steps": 2}))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", RANK, str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "training is complete" in ended.stdout, ended.stderr
    loaded = ended.stdout.splitlines()
    assert "torch" in loaded
    assert [name for name in NEEDLESS if name in loaded] == []

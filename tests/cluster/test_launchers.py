"""The trainer finds its rank under each launcher of the ecosystem by itself, and trains the same. `deepspeed` is what
`megatrain train` starts; `srun` is in test_jobs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.distributed.bootstrap import free_port
from tests.runs import Metrics, TinyData, finished_config, write_config

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT", "-m", "megatrain.train"],
    "mpirun": [str(BIN / "mpirun"), "-np", "2", "--oversubscribe", sys.executable, "-m", "megatrain.train"],
}
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_the_same_under_each_launcher(
    launcher: str, finished_run: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", finished_config(tiny_data, tmp_path / "run"))
    port = str(free_port())
    command = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    environment = {**os.environ, **ENVIRONMENT, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([*command, str(config)], env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert Metrics.read(tmp_path / "run").losses == Metrics.read(finished_run).losses

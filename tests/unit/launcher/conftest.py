"""`megatrain-launch` called in this process, in a folder with a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher import cli
from tests.in_process import Ended, caller

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "model": {**MODEL, "vocab_size": 512},
    "data": {"train": [{"path": "data/code"}], "seq_len": 64},
    "train": {"steps": 20, "global_batch_size": 32, "micro_batch_size": 2},
    "optimizer": {"lr": 1.0e-3},
}


Launch = Callable[..., Ended]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Launch:
    """Runs `megatrain-launch` in this process, in a folder with run.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({"run": {"dir": "runs/one"}, **CONFIG}))
    return caller("megatrain-launch", cli.main, monkeypatch, capfd)

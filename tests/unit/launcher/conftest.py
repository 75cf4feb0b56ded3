"""`megatrain-launch` called in this process, in a folder with a config."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from launcher import cli

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {
    "model": {**MODEL, "vocab_size": 512},
    "data": {"train": [{"path": "data/code"}], "seq_len": 64},
    "train": {"steps": 20, "global_batch_size": 32, "micro_batch_size": 2},
    "optimizer": {"lr": 1.0e-3},
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Launch = Callable[..., Ended]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Launch:
    """Runs `megatrain-launch` in this process, in a folder with run.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({"run": {"dir": "runs/one"}, **CONFIG}))

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["megatrain-launch", *arguments])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ended(code, *capfd.readouterr())

    return run

"""`train.deterministic` on one GPU: two runs are the same to the last bit, whatever computes attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.inspection import describe
from megatrain.checkpoint.stores import find_store
from tests.gpu.test_training import ENGINES, make_config, train
from tests.runs import TinyData

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

MODELS: dict[str, dict[str, Any]] = {
    "the best kernel": {},
    "flash": {"model": {"attention": "flash"}},
    "math": {"model": {"attention": "math"}},
    "documents": {"data": {"document_mask": True}},
    "dropout": {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "not compiled": {"train": {"compile": "off"}},
}


def checksums(run_dir: Path) -> list[str]:
    """Of the files of its last checkpoint: weights and optimizer state."""
    newest = max(find_store(run_dir).list(), key=lambda checkpoint: checkpoint.step)
    return [file["checksum"] for file in describe(newest.path)["files"] if file["file"].endswith(".safetensors")]


@pytest.mark.parametrize("engine", ["ZeRO 1", "ZeRO 3", "FSDP2, ZeRO 1"])
@pytest.mark.parametrize("model", MODELS)
def test_two_runs_are_alike_to_the_last_bit(model, engine, tiny_data: TinyData, tmp_path: Path):
    bits = {"train": {"precision": "bf16", "deterministic": True}, "parallel": ENGINES[engine]}
    runs = [tmp_path / "one", tmp_path / "other"]
    one, other = (train(make_config(tiny_data, run, MODELS[model], bits)) for run in runs)
    assert (one.losses, one.norms) == (other.losses, other.norms)
    assert checksums(runs[0]) == checksums(runs[1])

"""What a manifest says of its model is checked before a model is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import manifest

from megatrain.checkpoint.manifest import FileEntry
from megatrain.checkpoint.saved_config import saved_config
from megatrain.errors import CheckpointError

MODEL: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 512,
}
CONFIG: dict[str, Any] = {
    "model": MODEL,
    "data": {"seq_len": 64, "document_mask": False, "packing": "concat"},
    "train": {"precision": "bf16", "steps": 5},
}
FILES = [FileEntry(file="rank-00000.safetensors", bytes=500_000, checksum="")]


def test_configs_of_runs_and_imports_are_read(tmp_path: Path) -> None:
    saved = saved_config(manifest(1, FILES).model_copy(update={"config": CONFIG}), tmp_path)
    assert (saved.model.hidden_size, saved.data.seq_len, saved.train.precision) == (32, 64, "bf16")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, r"config\.model: Field required"),
    "a list for a model": ({**CONFIG, "model": []}, r"config\.model: "),
    "a key of a later version": ({**CONFIG, "model": {**MODEL, "num_experts": 8}}, r"config\.model\.num_experts: "),
    "another precision": ({**CONFIG, "train": {"precision": "int4"}}, r"config\.train\.precision: "),
    "windows of no tokens": ({**CONFIG, "data": {"seq_len": 0, "document_mask": False}}, r"config\.data\.seq_len: "),
    "no vocabulary": ({**CONFIG, "model": {**MODEL, "vocab_size": None}}, r"model\.vocab_size must be known"),
    "a model that no disk holds": (
        {**CONFIG, "model": {**MODEL, "num_hidden_layers": 10**7}},
        "its files are too small for the 103,040,016,416 parameters",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_unreadable_config_names_manifest_and_key(what: str, tmp_path: Path) -> None:
    config, words = REFUSED[what]
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {words}"):
        saved_config(manifest(1, FILES).model_copy(update={"config": config}), tmp_path)

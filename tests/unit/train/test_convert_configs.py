"""Config.json as anyone may write it: what is imported computes what transformers computes with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.transformers_config import from_transformers
from megatrain.errors import CheckpointError
from megatrain.families import FAMILIES
from megatrain.inference.loading import load_decoder
from megatrain.train.convert import export_checkpoint, import_folder

TOKENS = torch.arange(40).remainder(29).view(1, 40)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 8}


def optional(**choices: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=choices)


def rope(theta: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    kinds = st.sampled_from(
        [
            {},
            {"rope_type": "default"},
            {"type": "linear", "factor": 3.0},
            {"rope_type": "linear", "factor": 2},
            LLAMA3,
            {**LLAMA3, "original_max_position_embeddings": 16},
            {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 50.0},
        ]
    )
    return optional(
        rope_theta=theta,
        rope_scaling=kinds | st.none(),
        rope_parameters=kinds,
        original_max_position_embeddings=st.just(8),
    )


THETA = st.sampled_from([100.0, 1e4, 500000])
GATED = st.builds(
    lambda *parts: {k: v for part in parts for k, v in part.items()},
    st.fixed_dictionaries(
        {
            "model_type": st.sampled_from([name for name, each in FAMILIES.items() if each.block.attention.rotates]),
            "hidden_size": st.just(24),
            "intermediate_size": st.just(40),
            "num_hidden_layers": st.just(2),
            "num_attention_heads": st.just(4),
            "vocab_size": st.just(31),
            "max_position_embeddings": st.just(64),
        }
    ),
    optional(
        num_key_value_heads=st.sampled_from([1, 2, 4, None]),
        head_dim=st.sampled_from([6, 8, None]),
        rms_norm_eps=st.sampled_from([1e-6, 0.1]),
        tie_word_embeddings=st.booleans(),
        attention_dropout=st.sampled_from([0.0, 0, 0.25]),
    ),
    rope(THETA),
    optional(
        use_sliding_window=st.booleans(),
        sliding_window=st.sampled_from([8, 64, None]),
        max_window_layers=st.sampled_from([0, 1, 2]),
        layer_types=st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=2, max_size=2),
    ),
)
GPT2 = st.builds(
    lambda *parts: {k: v for part in parts for k, v in part.items()},
    st.just({"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 31, "n_positions": 64}),
    optional(
        n_inner=st.sampled_from([40, None]),
        n_head=st.sampled_from([2, 4]),
        num_attention_heads=st.sampled_from([2, 4]),
        layer_norm_epsilon=st.sampled_from([1e-5, 0.1]),
        tie_word_embeddings=st.booleans(),
        attn_pdrop=st.sampled_from([0.0, 0.2]),
        resid_pdrop=st.sampled_from([0.0, 0.3]),
        embd_pdrop=st.sampled_from([0.0, 0.3]),
    ),
)
CONFIGS = st.builds(
    lambda config, head: (config, head), GATED | GPT2, st.sampled_from(["as tied", "none", "equal", "of its own"])
)


def write_folder(folder: Path, config: Mapping[str, Any], head: str) -> None:
    """The folder of a model with random weights, biases and norms too; raises what transformers makes of the config."""
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in model.named_parameters()}
    embedding = next(iter(tensors))
    if head == "none":
        tensors.pop("lm_head.weight", None)
    elif head != "as tied":
        tensors["lm_head.weight"] = tensors[embedding] * (1.0 if head == "equal" else -0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS, use_cache=False).logits


BASE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
LLAMA = {"model_type": "llama", **BASE, "max_position_embeddings": 64}
QWEN3 = {"model_type": "qwen3", **BASE, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8}


@settings(
    max_examples=150 if os.environ.get("MEGATRAIN_ACCEPTANCE") else 8,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(CONFIGS)
@example(({**LLAMA, "tie_word_embeddings": True}, "of its own"))
@example(
    (
        {
            **LLAMA,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 8,
        },
        "as tied",
    )
)
@example(({**QWEN3, **WINDOWED, "max_window_layers": 2}, "as tied"))
@example(({**QWEN3, **WINDOWED, "layer_types": ["full_attention"] * 2}, "as tied"))
def test_every_imported_config_has_the_logits_of_transformers(case: tuple[dict[str, Any], str]) -> None:
    config, head = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        folder.mkdir()
        try:
            write_folder(folder, config, head)
            expected = logits_of(folder)
        except Exception:  # noqa: BLE001 - transformers itself can do nothing with it
            return
        try:
            import_folder(folder, Path(name) / "checkpoint")
        except CheckpointError:
            return
        ours = load_decoder(CheckpointReader(Path(name) / "checkpoint"))
        with torch.no_grad():
            context = ours.make_context(torch.arange(40).view(1, 40), None, None, torch.float32)
            torch.testing.assert_close(ours.logits(TOKENS, context), expected, atol=1e-4, rtol=1e-4)
        export_checkpoint(Path(name) / "checkpoint", Path(name) / "back")
        assert torch.equal(logits_of(Path(name) / "back"), expected)


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
CLASSIFIERS = {
    "vit": {**SMALL, "model_type": "vit", "image_size": 8, "patch_size": 4},
    "bert": {**SMALL, "model_type": "bert", "architectures": ["BertForSequenceClassification"]},
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize(
    "labels", [{"a": "x", "b": "y"}, {"0": "x", "2": "y"}, {"0": "x", "1": None}, ["x", "y"], "xy"], ids=str
)
def test_labels_without_names_are_not_imported(kind: str, labels: object) -> None:
    """Row k of the head would get the name of another label."""
    known = from_transformers({**CLASSIFIERS[kind], "id2label": {"1": "y", "0": "x"}}, Path("config.json"))
    assert known.num_answers == 2
    with pytest.raises(CheckpointError, match="id2label must have a text for each label, from 0 on"):
        from_transformers({**CLASSIFIERS[kind], "id2label": labels}, Path("config.json"))
    with pytest.raises(CheckpointError, match="has one label of several here"):
        from_transformers({**CLASSIFIERS[kind], "problem_type": "regression"}, Path("config.json"))

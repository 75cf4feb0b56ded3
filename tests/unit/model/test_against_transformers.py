"""The decoders compute what transformers computes, from the same weights: logits, loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import SIZES, decoder_like, logits, random_batch, twin
from torch.nn import functional

from megatrain.config.schema import ModelConfig, RopeScaling
from megatrain.families import FAMILIES
from megatrain.model.decoder import Decoder

LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"num_key_value_heads": 2},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-wide-heads": {"head_dim": 32, "num_key_value_heads": 1, "intermediate_size": 96},
    "llama-linear-rope": {"rope_scaling": RopeScaling(rope_type="linear", factor=4.0)},
    "llama-llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "mistral": {"family": "mistral", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral-window": {"family": "mistral", "num_key_value_heads": 2, "sliding_window": 37},
    "qwen2-tied": {"family": "qwen2", "num_key_value_heads": 2},
    "qwen2-untied": {"family": "qwen2", "head_dim": 24, "tie_word_embeddings": False},
    "qwen3-tied": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
    "qwen3-untied": {"family": "qwen3", "head_dim": 32, "hidden_size": 60, "tie_word_embeddings": False},
    "gpt2-tied": {"family": "gpt2"},
    "gpt2-untied": {"family": "gpt2", "tie_word_embeddings": False, "intermediate_size": 80},
}


@pytest.fixture(params=MODELS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**{**SIZES, **MODELS[request.param]})


def test_state_dict_has_transformers_names_in_its_order(config: ModelConfig) -> None:
    ours, theirs = Decoder(config).state_dict(), twin(config).state_dict()
    assert [(name, x.shape) for name, x in ours.items()] == [(name, x.shape) for name, x in theirs.items()]


def test_logits_loss_and_gradients_are_equal(config: ModelConfig) -> None:
    reference = twin(config)
    batch = random_batch(2, 200)
    model = decoder_like(reference, config)
    theirs_BTV = reference(batch.tokens_BT).logits
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch.tokens_BT), theirs_BTV, atol=1e-5, rtol=1e-5)
    loss = model(batch) / batch.targets_BM.numel()
    expected = functional.cross_entropy(theirs_BTV.flatten(0, 1), batch.targets_BM.flatten())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    theirs = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_far_positions_rotate_alike() -> None:
    config = ModelConfig(**SIZES | {"max_position_embeddings": 8192}, rope_scaling=LLAMA3)
    reference = twin(config)
    tokens_BT = random_batch(1, 64).tokens_BT
    positions_BT = torch.arange(8000, 8064).unsqueeze(0)
    with torch.no_grad():
        ours = logits(decoder_like(reference, config), tokens_BT, positions_BT)
        theirs = reference(tokens_BT, position_ids=positions_BT).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if "next_token" in each.objectives])
def test_bfloat16_loss_is_near_that_of_fp32(family: Any) -> None:
    config = ModelConfig(**SIZES, family=family)
    model = decoder_like(twin(config), config)
    batch = random_batch(2, 256)
    with torch.no_grad():
        exact = model(batch).item()
        rounded = model.to(torch.bfloat16)(batch)
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() / exact - 1) < 2e-3


def test_tied_weights_stay_tied_on_a_meta_model() -> None:
    with torch.device("meta"):
        model = Decoder(ModelConfig(**SIZES))
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.head.weight is model.get_parameter("model.embed_tokens.weight")
    assert "lm_head.weight" not in dict(model.named_parameters())

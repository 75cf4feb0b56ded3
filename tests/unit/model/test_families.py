"""A family's description, the modules that are built from it, and what transformers would hold are one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import SIZES

from megatrain.config.schema import ModelConfig
from megatrain.families import FAMILIES
from megatrain.model.decoder import Decoder, build_layers
from megatrain.model.encoder_decoder import whole_model
from megatrain.plan.flops import num_parameters, parameter_shapes

CASES = [(name, tied) for name, each in FAMILIES.items() for tied in (True, False) if not (each.reads_images and tied)]
"""What reads images has no token embedding to tie."""
POSITIONS = ("wpe.weight", "position_embeddings.weight", "attention_bias.weight", "position_embeddings", "cls_token")
EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "shared.weight", "word_embeddings.weight", "type_embeddings.weight")


def small(family: Any, *, tied: bool, **sizes: Any) -> ModelConfig:
    shares = {} if family != "marian" else {"share_encoder_decoder_embeddings": tied}
    return ModelConfig(**{**SIZES, **sizes, **shares}, family=family, tie_word_embeddings=tied)


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_modules_have_the_described_parameters(family: Any, tied: bool) -> None:
    config = small(family, tied=tied)
    built = {name: tuple(parameter.shape) for name, parameter in whole_model(config).named_parameters()}
    described = parameter_shapes(config)
    in_order = list if config.description.encoder is None else sorted  # modules lie by stacks
    assert in_order(described.items()) == in_order(built.items())
    assert num_parameters(config) == sum(torch.Size(shape).numel() for shape in built.values())


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_every_parameter_has_a_kind(family: Any, tied: bool) -> None:
    config = small(family, tied=tied)
    for name, parameter in whole_model(config).named_parameters():
        kind = config.description.kind_of(name)
        assert (kind in ("norms", "biases")) == (parameter.dim() == 1), name
        assert (kind == "norms") == any(part in name.lower() for part in ("norm", "ln_")), name
        assert (kind == "positions") == name.endswith(POSITIONS), name
        assert (kind == "embeddings") == name.endswith(EMBEDDINGS), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_but_small_ones_is_split(family: Any) -> None:
    config = small(family, tied=False)
    whole = {embedding.name for embedding in config.description.embeddings if embedding.rows != "vocab"}
    if (transform := config.description.head_transform) is not None:
        whole.add(f"{transform.name}.{transform.linear.name}")
    for name, module in whole_model(config).named_modules():
        weight, split = getattr(module, "weight", None), config.description.split_of(name)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and name not in whole:
            assert split is not None, name
            assert weight.shape[split.weight_dim] % (2 * split.num_parts) in (0, 1)  # 131 token ids: padding is due
        elif isinstance(weight, torch.Tensor) and weight.shape == (config.head_size,):
            assert split is not None and split.kind == "shared", name
        else:
            assert split is None, name


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.encoder is None])
def test_a_stage_builds_only_its_own_layers(family: Any) -> None:
    config = small(family, tied=False)
    specs = build_layers(config)
    names = [f"{spec.prefix}.{name}" for spec in specs for name, _ in spec.build().named_parameters()]
    assert names == [name for name, _ in Decoder(config).named_parameters()]
    kinds = [spec.kind for spec in specs if spec.kind != "embedding"]
    last = ["norm", "head"] if family != "bert" else ["transform", "head"]
    assert kinds == ["decoder"] * config.num_hidden_layers + last


@pytest.mark.parametrize("family", FAMILIES)
def test_a_meta_model_costs_no_memory(family: Any) -> None:
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "vocab_size": 128_256}
    config = small(family, tied=False, **large, intermediate_size=None)
    with torch.device("meta"):
        model = whole_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 50e9

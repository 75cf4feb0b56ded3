"""A classifier of images computes what transformers computes: logits, loss and every gradient, also of gray images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTEmbeddings

from megatrain.batch import Batch
from megatrain.config.schema import ModelConfig
from megatrain.model.decoder import Decoder
from megatrain.plan.flops import num_parameters
from megatrain.train.image_positions import resized

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-12,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}
SHAPES = {
    "gray": {"image_size": 28, "patch_size": 7, "num_channels": 1},
    "color": {"image_size": 32, "patch_size": 16, "num_channels": 3},
}
RENAMED = {"vit.encoder.layer.": "vit.layers.", "attention.attention.query": "attention.q_proj"}
RENAMED |= {"attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj"}
RENAMED |= {"attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
"""From names of files, which are ours, to those that modules have since transformers 5."""


def theirs_of(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(family="vit", **SIZES, **SHAPES[request.param])


def test_logits_loss_and_gradients_are_equal(config: ModelConfig) -> None:
    torch.manual_seed(0)
    shape = {key: getattr(config, key) for key in ("image_size", "patch_size", "num_channels")}
    sizes = {
        key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    reference = ViTForImageClassification(ViTConfig(**sizes, **shape, num_labels=10, initializer_range=0.2))
    theirs = dict(reference.named_parameters())
    model = Decoder(config)
    with torch.no_grad():
        for parameter in theirs.values():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[name if name in theirs else theirs_of(name)])
    assert num_parameters(config) == sum(parameter.numel() for parameter in theirs.values())
    pixels_BCHW = torch.randn(5, config.sizes["channels"], shape["image_size"], shape["image_size"])
    labels_B = torch.randint(0, 10, (5,))
    places_BT = torch.arange(config.num_places or 0).expand(5, -1)
    batch = Batch(places_BT, labels_B[:, None], None, places_BT, None, torch.arange(5))
    batch = batch._replace(target_places_BM=torch.zeros(5, 1, dtype=torch.int64), pixels_BCHW=pixels_BCHW)
    expected = reference(pixels_BCHW, labels=labels_B)
    logits_BMV = model.head(model._at_targets(model.hidden(batch.inputs, model.context(batch)), batch))
    torch.testing.assert_close(logits_BMV[:, 0], expected.logits, atol=1e-5, rtol=1e-5)
    loss = model(batch) / 5
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-6)
    loss.backward()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name if name in theirs else theirs_of(name)].grad, atol=1e-5, rtol=1e-4
        )
    scores = model.target_scores(batch)
    assert scores[1].tolist() == (expected.logits.argmax(-1) == labels_B).float().tolist()


def test_positions_of_another_size_are_transformers_interpolation() -> None:
    torch.manual_seed(0)
    embeddings = ViTEmbeddings(ViTConfig(hidden_size=8, image_size=12, patch_size=4, num_channels=1))
    positions_1AC = torch.randn(1, 10, 8)
    for size in (20, 12, 8):
        with torch.no_grad():
            embeddings.position_embeddings.copy_(positions_1AC)
            num_places = (size // 4) ** 2 + 1
            expected = embeddings.interpolate_pos_encoding(torch.empty(1, num_places, 8), size, size)
        torch.testing.assert_close(resized(positions_1AC, num_places), expected, atol=1e-6, rtol=0)

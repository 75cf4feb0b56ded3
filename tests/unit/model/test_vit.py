"""A classifier of images computes what transformers computes: logits, loss and every gradient, also of gray images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTEmbeddings

from megatrain.batch import Batch
from megatrain.config.schema import LoraConfig, ModelConfig
from megatrain.families import FAMILIES
from megatrain.model.decoder import Decoder
from megatrain.model.linear import add_adapters
from megatrain.plan.flops import adapter_shapes, num_parameters
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


def theirs_of(name: str, theirs: Mapping[str, Any]) -> str:
    """Modules have the names of files or, since transformers 5, others."""
    if name not in theirs:
        for old, new in FAMILIES["vit"].hugging_face.modules.items():
            name = name.replace(old, new)
    return name


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(family="vit", **SIZES, **SHAPES[request.param])


@pytest.fixture
def reference(config: ModelConfig) -> ViTForImageClassification:
    torch.manual_seed(0)
    keys = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    keys += "image_size", "patch_size", "num_channels"
    theirs = ViTConfig(**{key: getattr(config, key) for key in keys}, num_labels=10, initializer_range=0.2)
    model = ViTForImageClassification(theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def model(config: ModelConfig, reference: ViTForImageClassification) -> Decoder:
    ours, theirs = Decoder(config), dict(reference.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs[theirs_of(name, theirs)])
    assert num_parameters(config) == sum(parameter.numel() for parameter in theirs.values())
    return ours


def random_batch(config: ModelConfig) -> Batch:
    size = config.model_dump()["image_size"]
    pixels_BCHW, labels_B1 = torch.randn(5, config.sizes["channels"], size, size), torch.randint(0, 10, (5, 1))
    places_BT = torch.arange(config.num_places or 0).expand(5, -1)
    batch = Batch(places_BT, labels_B1, None, places_BT, None, torch.arange(5))
    return batch._replace(target_places_BM=torch.zeros(5, 1, dtype=torch.int64), pixels_BCHW=pixels_BCHW)


def test_logits_loss_and_gradients_are_equal(
    config: ModelConfig, reference: ViTForImageClassification, model: Decoder
) -> None:
    batch, theirs = random_batch(config), dict(reference.named_parameters())
    labels_B = batch.targets_BM[:, 0]
    expected = reference(batch.pixels_BCHW, labels=labels_B)
    logits_BMV = model.head(model._at_targets(model.hidden(batch.inputs, model.context(batch)), batch))
    torch.testing.assert_close(logits_BMV[:, 0], expected.logits, atol=1e-5, rtol=1e-5)
    loss = model(batch) / 5
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-6)
    loss.backward()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[theirs_of(name, theirs)].grad, atol=1e-5, rtol=1e-4)
    scores = model.target_scores(batch)
    assert scores[1].tolist() == (expected.logits.argmax(-1) == labels_B).float().tolist()


def test_adapters_compute_what_those_of_peft_do(
    config: ModelConfig, reference: ViTForImageClassification, model: Decoder
) -> None:
    batch, lora = random_batch(config), LoraConfig(rank=3, alpha=9.0)
    modules = {name for name, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    theirs = get_peft_model(reference, PeftConfig(r=3, lora_alpha=9, target_modules=[*modules - {"classifier"}]))
    adapters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    add_adapters(model, lora)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {theirs_of(name, adapters): tuple(p.shape) for name, p in trained.items()} == {
        name: tuple(p.shape) for name, p in adapters.items()
    }
    assert adapter_shapes(config, lora) == {name: tuple(p.shape) for name, p in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapters[theirs_of(name, adapters)].normal_(std=0.1))
    loss, expected = model(batch) / 5, theirs(batch.pixels_BCHW, labels=batch.targets_BM[:, 0]).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    loss.backward()
    expected.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, adapters[theirs_of(name, adapters)].grad, atol=1e-5, rtol=1e-4)


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

"""ViT: an encoder of an image's patches, a class token, learned positions, LayerNorm before each part, GELU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from megatrain.families.description import (
    LARGEST_SIZE,
    Attention,
    Block,
    Family,
    HuggingFace,
    Linear,
    Mlp,
    Norm,
    PatchEmbedding,
    Width,
    not_one_label,
)


def _linear(name: str, inputs: Width, outputs: Width) -> Linear:
    return Linear(name, inputs, (outputs,), bias=True)


def _size(default: int, text: str) -> tuple[type, Any]:
    return int, Field(default=default, ge=1, le=LARGEST_SIZE, description=text)


def _refuse(theirs: Mapping[str, Any]) -> str | None:
    for key in ("image_size", "patch_size"):
        if isinstance(theirs[key], list | tuple):
            return f"{key} is {theirs[key]!r}; only squares can be imported, whose {key} is one number."
    return not_one_label(theirs, "an image")


FAMILY = Family(
    summary="an encoder of images: classification by a class token, learned positions, LayerNorm before each part",
    objectives=("image_classification",),
    embeddings=(PatchEmbedding("vit.embeddings"),),
    block=Block(
        prefix="vit.encoder.layer",
        attention=Attention(
            name="attention",
            inputs=tuple(_linear(f"attention.{name}", "hidden", "queries") for name in ("query", "key", "value")),
            output=_linear("output.dense", "queries", "hidden"),
            is_causal=False,
        ),
        attention_norm=Norm("layernorm_before", "layer"),
        mlp=Mlp(
            name="",
            inputs=(_linear("intermediate.dense", "hidden", "ffn"),),
            output=_linear("output.dense", "ffn", "hidden"),
            activation="gelu",
        ),
        mlp_norm=Norm("layernorm_after", "layer"),
    ),
    norm=Norm("vit.layernorm", "layer"),
    head=Linear("classifier", "hidden", ("vocab",), bias=True),
    asks_at_places=True,
    own_keys={
        "image_size": _size(224, "vit: height and width of the images, which are resized to it; in pixels."),
        "patch_size": _size(16, "vit: height and width of a patch, which divides image_size."),
        "num_channels": _size(3, "vit: 3: images in color; 1: in gray."),
    },
    hugging_face=HuggingFace(
        architecture="ViTForImageClassification",
        names={
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "layer_norm_epsilon": "layer_norm_eps",
            "attention_dropout": "attention_probs_dropout_prob",
            "hidden_dropout": "hidden_dropout_prob",
            "image_size": "image_size",
            "patch_size": "patch_size",
            "num_channels": "num_channels",
        },
        required={"hidden_act": "gelu", "qkv_bias": True},
        absent={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
        },
        unread=(r"vit\.pooler\..*",),
        modules={
            "vit.encoder.layer.": "vit.layers.",
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        },
        labels_key="vocab_size",
        refuse=_refuse,
    ),
)

"""Mistral: llama with a window of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from megatrain.families import llama
from megatrain.families.description import LARGEST_SIZE, HuggingFace

LLAMA = llama.FAMILY
WINDOW = "sliding_window"


def refuse_layer_types(theirs: Mapping[str, Any]) -> str | None:
    """With ``layer_types``, transformers makes another model of a mistral: one with a window in some layers."""
    others = set(theirs.get("layer_types") or ()) - {"sliding_attention"}
    if not others or theirs[WINDOW] is None:
        return None
    return f"layer_types has {', '.join(sorted(map(repr, others)))}; here all layers of a mistral have the window."


FAMILY = replace(
    LLAMA,
    summary="llama with a window of attention",
    block=replace(LLAMA.block, attention=replace(LLAMA.block.attention, window_key=WINDOW)),
    own_keys={
        WINDOW: (
            int | None,
            Field(
                default=None,
                ge=1,
                le=LARGEST_SIZE,
                description="mistral: how many tokens a token attends to, itself among them; null: all before it.",
            ),
        )
    },
    hugging_face=HuggingFace(
        architecture="MistralForCausalLM",
        names={**llama.NAMES, WINDOW: WINDOW},
        required={"hidden_act": "silu", "attention_bias": False},
        absent={
            **LLAMA.hugging_face.absent,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            WINDOW: 4096,
        },
        refuse=refuse_layer_types,
    ),
)

"""Mistral: llama with a window of attention."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from megatrain.families import llama
from megatrain.families.description import LARGEST_SIZE, HuggingFace

LLAMA = llama.FAMILY
WINDOW = "sliding_window"

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
    ),
)

"""Mistral: llama's layers, as long as no attention window is shorter than the context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatrain.families import llama, qwen3
from megatrain.families.description import HuggingFace

LLAMA = llama.FAMILY.hugging_face


def _refuse(theirs: Mapping[str, Any]) -> str | None:
    return qwen3.window_refusal(theirs["sliding_window"], theirs["max_position_embeddings"])


FAMILY = replace(
    llama.FAMILY,
    summary="llama under another name",
    hugging_face=HuggingFace(
        architecture="MistralForCausalLM",
        names=llama.NAMES,
        required={"hidden_act": "silu", "attention_bias": False},
        absent={
            **LLAMA.absent,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        constants={"sliding_window": None},
        refuse=_refuse,
    ),
)

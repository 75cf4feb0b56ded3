"""Qwen3: llama with queries and keys normalized, each head by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatrain.families import llama
from megatrain.families.description import HuggingFace, Norm

LLAMA = llama.FAMILY


def refuse_window(theirs: Mapping[str, Any]) -> str | None:
    """The window is that of the layers that ``layer_types`` says, else of those from ``max_window_layers`` on.

    One that is at least as long as the context changes nothing; a shorter one is another model.
    """
    window, longest = theirs["sliding_window"], theirs["max_position_embeddings"]
    if not theirs.get("use_sliding_window"):
        window = None
    kinds = theirs.get("layer_types")
    if kinds is None:
        slides = window is not None and theirs["max_window_layers"] < theirs["num_hidden_layers"]
        kinds = ["sliding_attention" if slides else "full_attention"]
    others = set(kinds) - {"full_attention"}
    if others and (window is None or others != {"sliding_attention"}):
        return f"layer_types has {', '.join(map(repr, sorted(others)))}; full attention is done."
    if not others or window >= longest:
        return None
    return (
        f"layers are limited to a window of {window} tokens (sliding_window), where max_position_embeddings is "
        f"{longest}; here a family has a window in all layers (mistral) or in none. Up to {window} tokens both are the "
        f"same: set max_position_embeddings to {window} in config.json to import the model for that context."
    )


FAMILY = replace(
    LLAMA,
    summary="llama with queries and keys normalized",
    block=replace(
        LLAMA.block,
        attention=replace(
            LLAMA.block.attention, head_norms=(Norm("q_norm", "rms", width="head"), Norm("k_norm", "rms", width="head"))
        ),
    ),
    hugging_face=HuggingFace(
        architecture="Qwen3ForCausalLM",
        names=llama.NAMES,
        required={"hidden_act": "silu", "attention_bias": False},
        absent={
            **LLAMA.hugging_face.absent,
            "bos_token_id": None,
            "eos_token_id": None,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        constants={"sliding_window": None, "use_sliding_window": False},
        refuse=refuse_window,
    ),
)

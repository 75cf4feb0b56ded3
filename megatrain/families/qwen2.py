"""Qwen2 and Qwen2.5: llama with biases of queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from megatrain.families import llama, qwen3

LLAMA = llama.FAMILY
ATTENTION = LLAMA.block.attention

FAMILY = replace(
    LLAMA,
    summary="llama with biases of queries, keys and values",
    block=replace(
        LLAMA.block,
        attention=replace(ATTENTION, inputs=tuple(replace(linear, bias=True) for linear in ATTENTION.inputs)),
    ),
    hugging_face=replace(
        qwen3.FAMILY.hugging_face,
        architecture="Qwen2ForCausalLM",
        required={"hidden_act": "silu"},
        absent={**qwen3.FAMILY.hugging_face.absent, "head_dim": None},
    ),
)

"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatrain.families.description import Attention, Block, Embedding, Family, HuggingFace, Linear, Mlp, Norm

NAMES = {
    key: key
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_dropout",
    )
}


def _warnings(theirs: Mapping[str, Any]) -> list[str]:
    found = []
    hidden, heads, deviation = theirs["hidden_size"], theirs["num_attention_heads"], theirs["initializer_range"]
    if hidden % heads:
        found.append(
            f"transformers 5 does not load a llama whose hidden_size ({hidden}) is no multiple of num_attention_heads "
            f"({heads}); transformers 4 does. Family mistral is the same model, and both load it."
        )
    if deviation > 1.0:
        found.append(f"transformers 5 does not load a llama whose initializer_range ({deviation}) is over 1.0.")
    return found


FAMILY = Family(
    summary="RMSNorm, rotary positions, grouped-query attention, a gated MLP",
    embeddings=(Embedding("model.embed_tokens", "vocab"),),
    block=Block(
        prefix="model.layers",
        attention_norm=Norm("input_layernorm", "rms"),
        attention=Attention(
            name="self_attn",
            inputs=(
                Linear("q_proj", "hidden", ("queries",)),
                Linear("k_proj", "hidden", ("keys",)),
                Linear("v_proj", "hidden", ("keys",)),
            ),
            output=Linear("o_proj", "queries", ("hidden",)),
            rotates=True,
        ),
        mlp_norm=Norm("post_attention_layernorm", "rms"),
        mlp=Mlp(
            name="mlp",
            inputs=(Linear("gate_proj", "hidden", ("ffn",)), Linear("up_proj", "hidden", ("ffn",))),
            output=Linear("down_proj", "ffn", ("hidden",)),
            activation="silu",
        ),
        norms_last=True,
    ),
    norm=Norm("model.norm", "rms"),
    head=Linear("lm_head", "hidden", ("vocab",)),
    hugging_face=HuggingFace(
        architecture="LlamaForCausalLM",
        names=NAMES,
        required={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        absent={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "attention_dropout": 0.0,
        },
        warnings=_warnings,
    ),
)

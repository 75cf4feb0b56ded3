"""T5 v1.1: an encoder-decoder model with relative positions, RMSNorm, GEGLU, no biases (Raffel et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from megatrain.families.description import (
    LARGEST_SIZE,
    Attention,
    Block,
    Embedding,
    Family,
    HuggingFace,
    Linear,
    Mlp,
    Norm,
    RelativeBias,
    Stack,
    Width,
)


def _attention(name: str, *, bias_of: Literal["encoder", "decoder"] | None = None) -> Attention:
    """``bias_of``: self-attention in this stack, whose layers add its bias to their scores."""
    table = f"{bias_of}.block.0.{name}.relative_attention_bias"
    return Attention(
        name=name,
        inputs=(
            Linear("q", "hidden", ("queries",)),
            Linear("k", "hidden", ("queries",)),
            Linear("v", "hidden", ("queries",)),
        ),
        output=Linear("o", "queries", ("hidden",)),
        is_causal=bias_of == "decoder",
        is_scaled=False,
        relative_bias=RelativeBias(table) if bias_of else None,
    )


def _mlp(layer: int) -> Mlp:
    return Mlp(
        name=f"layer.{layer}.DenseReluDense",
        inputs=(Linear("wi_0", "hidden", ("ffn",)), Linear("wi_1", "hidden", ("ffn",))),
        output=Linear("wo", "ffn", ("hidden",)),
        activation="gelu_tanh",
    )


def _deviation(module: str, sizes: Mapping[Width, int]) -> float:
    """As Mesh TensorFlow draws them: attention's factor 1 / sqrt(head width) is in the queries' initial values. The
    head's are those that give logits of variance 1, as an embedding that is tied and scaled does."""
    match module.rpartition(".")[2]:
        case "q":
            return float((sizes["hidden"] * sizes["head"]) ** -0.5)
        case "o":
            return float(sizes["queries"] ** -0.5)
        case "wo":
            return float(sizes["ffn"] ** -0.5)
        case "shared":
            return 1.0
        case _:
            return float(sizes["hidden"] ** -0.5)


def _refuse(theirs: Mapping[str, Any]) -> str | None:
    if theirs.get("is_decoder") or not theirs.get("is_encoder_decoder", True):
        return "a T5 of an encoder or a decoder alone; here a t5 has both."
    return None


def _implied(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """T5 v1.0 scaled what its tied head is applied to, and v1.1 told by the head of its own that it does not."""
    return {"scale_decoder_outputs": keys["tie_word_embeddings"] is not False}


_EMBEDDING = Embedding("shared", "vocab")

FAMILY = Family(
    summary="encoder and decoder, relative positions, RMSNorm, a gated MLP (T5 v1.1)",
    encoder=Stack(
        embeddings=(_EMBEDDING,),
        block=Block(
            prefix="encoder.block",
            attention_norm=Norm("layer.0.layer_norm", "rms"),
            attention=_attention("layer.0.SelfAttention", bias_of="encoder"),
            mlp_norm=Norm("layer.1.layer_norm", "rms"),
            mlp=_mlp(1),
        ),
        norm=Norm("encoder.final_layer_norm", "rms"),
    ),
    embeddings=(_EMBEDDING,),
    block=Block(
        prefix="decoder.block",
        attention_norm=Norm("layer.0.layer_norm", "rms"),
        attention=_attention("layer.0.SelfAttention", bias_of="decoder"),
        cross_attention_norm=Norm("layer.1.layer_norm", "rms"),
        cross_attention=_attention("layer.1.EncDecAttention"),
        mlp_norm=Norm("layer.2.layer_norm", "rms"),
        mlp=_mlp(2),
    ),
    norm=Norm("decoder.final_layer_norm", "rms"),
    head=Linear("lm_head", "hidden", ("vocab",)),
    objectives=("span_corruption", "sequence_to_sequence"),
    initial_deviation=_deviation,
    defaults={"tie_word_embeddings": False},
    implied=_implied,
    own_keys={
        "num_decoder_layers": (
            int | None,
            Field(
                default=None,
                ge=1,
                le=LARGEST_SIZE,
                description="Families with an encoder: layers of the decoder; null: num_hidden_layers, which are the "
                "encoder's.",
            ),
        ),
        "relative_attention_num_buckets": (
            int,
            Field(
                default=32,
                ge=4,
                le=LARGEST_SIZE,
                description="t5: ranges of distances between tokens, each of which has a bias of its own for each "
                "head; a multiple of 4.",
            ),
        ),
        "relative_attention_max_distance": (
            int,
            Field(
                default=128,
                ge=4,
                le=LARGEST_SIZE,
                description="t5: from this distance on all are in one range; more than half of "
                "relative_attention_num_buckets.",
            ),
        ),
        "scale_decoder_outputs": (
            bool,
            Field(
                default=False,
                description="t5: what the head is applied to is divided by the square root of hidden_size. Left out, "
                "it is where the head is the embedding (tie_word_embeddings), as in T5 v1.0 and in transformers.",
            ),
        ),
    },
    hugging_face=HuggingFace(
        architecture="T5ForConditionalGeneration",
        names={
            "hidden_size": "d_model",
            "intermediate_size": "d_ff",
            "num_hidden_layers": "num_layers",
            "num_decoder_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "head_dim": "d_kv",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "relative_attention_num_buckets": "relative_attention_num_buckets",
            "relative_attention_max_distance": "relative_attention_max_distance",
            "scale_decoder_outputs": "scale_decoder_outputs",
            "attention_dropout": "dropout_rate",
            "hidden_dropout": "dropout_rate",
        },
        required={"feed_forward_proj": "gated-gelu"},
        absent={
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_decoder_layers": None,
            "num_heads": 8,
            "n_positions": 512,
            "layer_norm_epsilon": 1e-6,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "dropout_rate": 0.1,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        constants={"is_encoder_decoder": True},
        refuse=_refuse,
    ),
)

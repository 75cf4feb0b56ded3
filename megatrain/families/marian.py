"""The original Transformer: encoder and decoder, LayerNorm behind each sum, sinusoidal positions (Vaswani et al. 2017,
"Attention Is All You Need"), with Marian's bias of the logits, as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from megatrain.families import t5
from megatrain.families.description import (
    LARGEST_SIZE,
    Attention,
    Block,
    Embedding,
    Family,
    FirstLayer,
    HuggingFace,
    Linear,
    Misfit,
    Mlp,
    Norm,
    SinusoidalPositions,
    Stack,
    Width,
)

_ACTIVATIONS: Mapping[str, Literal["gelu", "relu", "silu"]] = {"gelu": "gelu", "relu": "relu", "swish": "silu"}


def _linear(name: str, inputs: Width, outputs: Width) -> Linear:
    return Linear(name, inputs, (outputs,), bias=True)


def _attention(name: str, *, is_causal: bool = False) -> Attention:
    return Attention(
        name=name,
        inputs=tuple(_linear(f"{part}_proj", "hidden", "queries") for part in "qkv"),
        output=_linear("out_proj", "queries", "hidden"),
        is_causal=is_causal,
    )


def _block(stack: str, activation: str) -> Block:
    decodes = stack == "decoder"
    return Block(
        prefix=f"model.{stack}.layers",
        attention=_attention("self_attn", is_causal=decodes),
        attention_norm=Norm("self_attn_layer_norm", "layer"),
        cross_attention=_attention("encoder_attn") if decodes else None,
        cross_attention_norm=Norm("encoder_attn_layer_norm", "layer") if decodes else None,
        mlp=Mlp(
            name="",
            inputs=(_linear("fc1", "hidden", "ffn"),),
            output=_linear("fc2", "ffn", "hidden"),
            activation=_ACTIVATIONS[activation],
        ),
        mlp_norm=Norm("final_layer_norm", "layer"),
        is_post_norm=True,
    )


def _embeddings(stack: str, *, is_shared: bool, is_scaled: bool) -> tuple[FirstLayer, ...]:
    name = "model.shared" if is_shared else f"model.{stack}.embed_tokens"
    rows: Literal["vocab", "source_vocab"] = "vocab" if is_shared or stack == "decoder" else "source_vocab"
    return Embedding(name, rows, is_scaled), SinusoidalPositions(f"model.{stack}.embed_positions")


@lru_cache(maxsize=16)
def _family(activation: str, *, is_shared: bool, is_scaled: bool) -> Family:
    """``is_shared``: encoder and decoder have one embedding."""
    encoder = _embeddings("encoder", is_shared=is_shared, is_scaled=is_scaled)
    return replace(
        FAMILY,
        encoder=Stack(encoder, _block("encoder", activation), norm=None),
        embeddings=_embeddings("decoder", is_shared=is_shared, is_scaled=is_scaled),
        block=_block("decoder", activation),
        hugging_face=replace(FAMILY.hugging_face, unread=(*_POSITIONS, *(_SECOND_NAMES if is_shared else ()))),
    )


def _variant(model: Any) -> Family:
    is_shared, is_scaled = model.share_encoder_decoder_embeddings, model.scale_embedding
    return _family(model.activation_function, is_shared=is_shared, is_scaled=is_scaled)


def _misfit(model: Any) -> Misfit | None:
    """An embedding that both stacks share has one vocabulary, and so has the head, which is the decoder's embedding."""
    if not model.share_encoder_decoder_embeddings:
        return None
    if model.decoder_vocab_size not in (None, model.vocab_size):
        reason = "must be model.vocab_size where model.share_encoder_decoder_embeddings is true"
        return Misfit("decoder_vocab_size", reason, "null")
    if not model.tie_word_embeddings:
        reason = "transformers shares no embedding of a marian then: set share_encoder_decoder_embeddings=false too"
        return Misfit("tie_word_embeddings", reason, "true")
    return None


def _refuse(theirs: Mapping[str, Any]) -> str | None:
    for key in ("attention_heads", "ffn_dim"):
        if theirs[f"encoder_{key}"] != theirs[f"decoder_{key}"]:
            return f"encoder_{key} and decoder_{key} differ; here the layers of both stacks have the same widths."
    return None


_POSITIONS = (r"model\.(encoder|decoder)\.embed_positions\.weight",)
_SECOND_NAMES = (r"model\.(encoder|decoder)\.embed_tokens\.weight",)
"""Of a shared embedding, in older folders."""
_ENCODER, _DECODER = (_embeddings(stack, is_shared=True, is_scaled=False) for stack in ("encoder", "decoder"))

FAMILY = Family(
    summary="the original Transformer: encoder and decoder, sinusoidal positions, LayerNorm behind each sum",
    encoder=Stack(_ENCODER, _block("encoder", "gelu"), norm=None),
    embeddings=_DECODER,
    block=_block("decoder", "gelu"),
    norm=None,
    head=Linear("lm_head", "hidden", ("vocab",), bias=True),
    objectives=("sequence_to_sequence", "span_corruption"),
    variant=_variant,
    misfit=_misfit,
    never_writes_start=True,
    own_keys={
        "num_decoder_layers": t5.FAMILY.own_keys["num_decoder_layers"],
        "activation_function": (
            Literal["gelu", "relu", "swish"],
            Field(default="gelu", description="marian: between the products of the MLP; the original one: relu."),
        ),
        "scale_embedding": (
            bool,
            Field(
                default=False,
                description="marian: the vectors of tokens are multiplied by the square root of hidden_size, before "
                "positions are added, as in the original one.",
            ),
        ),
        "share_encoder_decoder_embeddings": (
            bool,
            Field(
                default=True,
                description="marian: source and target have one vocabulary, and the encoder and the decoder one "
                "embedding; false: one of its own each.",
            ),
        ),
        "decoder_vocab_size": (
            int | None,
            Field(
                default=None,
                ge=1,
                le=LARGEST_SIZE,
                description="marian: token ids of the target, where its vocabulary is not that of the source, whose "
                "are vocab_size; null: the dataset's target tokenizer decides, or, without one, vocab_size.",
            ),
        ),
    },
    hugging_face=HuggingFace(
        architecture="MarianMTModel",
        names={
            "hidden_size": "d_model",
            "intermediate_size": "encoder_ffn_dim",
            "num_hidden_layers": "encoder_layers",
            "num_decoder_layers": "decoder_layers",
            "num_attention_heads": "encoder_attention_heads",
            "max_position_embeddings": "max_position_embeddings",
            "initializer_range": "init_std",
            "attention_dropout": "attention_dropout",
            "hidden_dropout": "dropout",
            "activation_function": "activation_function",
            "scale_embedding": "scale_embedding",
            "share_encoder_decoder_embeddings": "share_encoder_decoder_embeddings",
            "decoder_vocab_size": "decoder_vocab_size",
        },
        copies={"decoder_attention_heads": "num_attention_heads", "decoder_ffn_dim": "intermediate_size"},
        required={"activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
        absent={
            "vocab_size": 58101,
            "decoder_vocab_size": None,
            "d_model": 1024,
            "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "max_position_embeddings": 1024,
            "init_std": 0.02,
            "attention_dropout": 0.0,
            "dropout": 0.1,
            "activation_function": "gelu",
            "scale_embedding": False,
            "share_encoder_decoder_embeddings": True,
            "tie_word_embeddings": True,
            "pad_token_id": 58100,
            "eos_token_id": 0,
        },
        one_row={"lm_head.bias": "final_logits_bias"},
        unread=(*_POSITIONS, *_SECOND_NAMES),
        constants={"is_encoder_decoder": True, "forced_eos_token_id": None},
        refuse=_refuse,
    ),
)

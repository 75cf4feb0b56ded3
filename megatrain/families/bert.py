"""BERT: an encoder that reads a text from both sides, LayerNorm behind each sum, learned positions, segments, GELU.

Its head predicts tokens, or classifies a text by what its first token has become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from megatrain.families.description import (
    LARGEST_SIZE,
    Attention,
    Block,
    Embedding,
    Family,
    HeadTransform,
    HuggingFace,
    Linear,
    Mlp,
    Norm,
    Width,
    not_one_label,
)

SEGMENTS = "type_vocab_size"
LABELS = "num_labels"


def _linear(name: str, inputs: Width, outputs: Width) -> Linear:
    return Linear(name, inputs, (outputs,), bias=True)


def _refuse(theirs: Mapping[str, Any]) -> str | None:
    kind = theirs.get("position_embedding_type") or "absolute"
    return None if kind == "absolute" else f"position_embedding_type is {kind!r}; only 'absolute' is done."


def _refuse_classifier(theirs: Mapping[str, Any]) -> str | None:
    dropout, rate = theirs.get("classifier_dropout"), theirs.get("hidden_dropout_prob")
    if dropout not in (None, rate):
        return f"classifier_dropout is {dropout!r}; it must be null, or as hidden_dropout_prob ({rate!r})."
    return not_one_label(theirs, "a text") or _refuse(theirs)


_MASKED_LM = Family(
    summary="an encoder: masked language modeling or classification of texts, learned positions, segments, LayerNorm "
    "behind each sum",
    objectives=("masked_lm",),
    embeddings=(
        Embedding("bert.embeddings.word_embeddings", "vocab"),
        Embedding("bert.embeddings.position_embeddings", "positions"),
        Embedding("bert.embeddings.token_type_embeddings", "segments"),
    ),
    embedding_norm=Norm("bert.embeddings.LayerNorm", "layer"),
    block=Block(
        prefix="bert.encoder.layer",
        attention=Attention(
            name="attention",
            inputs=tuple(_linear(f"self.{name}", "hidden", "queries") for name in ("query", "key", "value")),
            output=_linear("output.dense", "queries", "hidden"),
            is_causal=False,
        ),
        attention_norm=Norm("attention.output.LayerNorm", "layer"),
        mlp=Mlp(
            name="",
            inputs=(_linear("intermediate.dense", "hidden", "ffn"),),
            output=_linear("output.dense", "ffn", "hidden"),
            activation="gelu",
        ),
        mlp_norm=Norm("output.LayerNorm", "layer"),
        is_post_norm=True,
    ),
    norm=None,
    head_transform=HeadTransform(
        name="cls.predictions.transform",
        linear=_linear("dense", "hidden", "hidden"),
        activation="gelu",
        norm=Norm("LayerNorm", "layer"),
    ),
    head=Linear("cls.predictions.decoder", "hidden", ("vocab",), bias=True),
    asks_at_places=True,
    own_keys={
        SEGMENTS: (
            int,
            Field(
                default=2,
                ge=1,
                le=LARGEST_SIZE,
                description="bert: segments that a document can have, such as two sentences (token types).",
            ),
        ),
        LABELS: (
            int | None,
            Field(
                default=None,
                ge=2,
                le=LARGEST_SIZE,
                description="bert: labels of a head that classifies texts, as many as the data's; null: the head "
                "predicts tokens.",
            ),
        ),
    },
    hugging_face=HuggingFace(
        architecture="BertForMaskedLM",
        names={
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "max_position_embeddings": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_eps",
            "attention_dropout": "attention_probs_dropout_prob",
            "hidden_dropout": "hidden_dropout_prob",
            SEGMENTS: SEGMENTS,
        },
        required={"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False},
        absent={
            "pad_token_id": 0,
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": 0.1,
            "hidden_dropout_prob": 0.1,
            "tie_word_embeddings": True,
            SEGMENTS: 2,
        },
        parameters={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        unread=(r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*"),
        refuse=_refuse,
    ),
)

FAMILY = replace(
    _MASKED_LM,
    classifier=replace(
        _MASKED_LM,
        objectives=("sequence_classification",),
        head_transform=HeadTransform("bert.pooler", _linear("dense", "hidden", "hidden"), "tanh", drops=True),
        head=_linear("classifier", "hidden", "labels"),
        hugging_face=replace(
            _MASKED_LM.hugging_face,
            architecture="BertForSequenceClassification",
            parameters={},
            unread=(r"bert\.embeddings\.position_ids",),
            labels_key=LABELS,
            refuse=_refuse_classifier,
        ),
    ),
)

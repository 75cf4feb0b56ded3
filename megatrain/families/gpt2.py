"""GPT-2: LayerNorm, learned positions, a fused query-key-value product, GELU, biases everywhere."""

from __future__ import annotations

from megatrain.families.description import Attention, Block, Embedding, Family, HuggingFace, Linear, Mlp, Norm, Width


def _conv1d(name: str, inputs: Width, *outputs: Width) -> Linear:
    return Linear(name, inputs, outputs, bias=True, is_conv1d=True)


FAMILY = Family(
    summary="LayerNorm, learned positions, heads of all the same kind, a plain MLP with GELU, biases",
    embeddings=(Embedding("transformer.wte", "vocab"), Embedding("transformer.wpe", "positions")),
    block=Block(
        prefix="transformer.h",
        attention_norm=Norm("ln_1", "layer"),
        attention=Attention(
            name="attn",
            inputs=(_conv1d("c_attn", "hidden", "queries", "queries", "queries"),),
            output=_conv1d("c_proj", "queries", "hidden"),
        ),
        mlp_norm=Norm("ln_2", "layer"),
        mlp=Mlp(
            name="mlp",
            inputs=(_conv1d("c_fc", "hidden", "ffn"),),
            output=_conv1d("c_proj", "ffn", "hidden"),
            activation="gelu_tanh",
        ),
    ),
    norm=Norm("transformer.ln_f", "layer"),
    head=Linear("lm_head", "hidden", ("vocab",)),
    hugging_face=HuggingFace(
        architecture="GPT2LMHeadModel",
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "layer_norm_epsilon": "layer_norm_epsilon",
            "attention_dropout": "attn_pdrop",
            "hidden_dropout": "resid_pdrop",
        },
        required={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        absent={
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "n_positions": 1024,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
        aliases=("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        copies={"embd_pdrop": "hidden_dropout", "n_ctx": "max_position_embeddings"},
    ),
)

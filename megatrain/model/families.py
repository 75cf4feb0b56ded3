"""The families: their layers in order under Hugging Face's names, and the table of how tensor parallelism splits them.

A pipeline stage builds the layers that are its own; a whole Decoder builds all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import nn

from megatrain.model.dropout import Dropout
from megatrain.model.embedding import PositionEmbedding, TokenEmbedding
from megatrain.model.gpt2 import Gpt2Layer
from megatrain.model.llama import LlamaLayer
from megatrain.model.loss import OutputHead
from megatrain.model.norm import LayerNorm, RmsNorm

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

LayerKind = Literal["embedding", "decoder", "norm", "head"]
SplitKind = Literal["column", "row", "vocab", "shared"]


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the stack: ``prefix`` + "." + a parameter's name in it is the parameter's canonical name.

    Every layer is called as ``layer(x, context)`` and returns the next x (the first takes token ids), but for the head,
    which takes x alone: ``head(x)`` gives logits, ``head.loss_sum(x, targets, loss_mask)`` the loss.
    """

    prefix: str
    kind: LayerKind
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class Split:
    """How tensor parallelism cuts one module's parameters.

    ``kind``: "column" cuts the outputs, "row" the inputs (its bias stays whole), "vocab" the token ids; "shared" cuts
    nothing, but each rank applies the whole to heads of its own, so that it sees a part of the gradient.
    ``weight_dim``: the dimension of the weight that is cut (a gpt2 Conv1D is [in, out], a Linear [out, in]).
    ``num_parts``: tensors that lie side by side along it, each of which is cut (three in a fused query-key-value).
    ``by_heads``: "query" or "key_value" where the cut must fall between heads.
    """

    kind: SplitKind
    weight_dim: int
    num_parts: int = 1
    by_heads: Literal["query", "key_value"] | None = None


@dataclass(frozen=True)
class Family:
    """What is particular to a family.

    ``build_layers``: config and seed of dropout to the ordered stack. ``splits``: last parts of a module's name to how
    it is cut; what is not listed is whole on every rank. ``residual_projections``: the modules that write to the
    residual stream. ``rotates``: positions enter by rotation of queries and keys.
    """

    build_layers: Callable[[ModelConfig, int], list[LayerSpec]]
    splits: Mapping[str, Split]
    residual_projections: tuple[str, ...]
    rotates: bool

    def split_of(self, module_name: str) -> Split | None:
        """How the module of this canonical name is cut; None: not at all."""
        return next((split for suffix, split in self.splits.items() if f".{module_name}".endswith(f".{suffix}")), None)


def build_layers(config: ModelConfig, seed: int = 0) -> list[LayerSpec]:
    """The stack of the config's family, in order; nothing is built yet. ``seed`` is that of dropout."""
    return family_of(config).build_layers(config, seed)


def family_of(config: ModelConfig) -> Family:
    """The config's family."""
    return FAMILIES[config.family]


def required_vocab_size(config: ModelConfig) -> int:
    """The vocabulary's size, which by now must be known."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is to be taken from the dataset before a model is built")
    return config.vocab_size


def _llama_layers(config: ModelConfig, seed: int, *, head_norms: bool) -> list[LayerSpec]:
    vocab, size = required_vocab_size(config), config.hidden_size

    def embedding() -> nn.Module:
        return TokenEmbedding(vocab, size, Dropout(config.hidden_dropout, seed, "model.embed_tokens"))

    def decoder(layer: int) -> LayerSpec:
        prefix = f"model.layers.{layer}"
        return LayerSpec(prefix, "decoder", lambda: LlamaLayer(config, layer, seed, prefix, head_norms))

    return [
        LayerSpec("model.embed_tokens", "embedding", embedding),
        *(decoder(layer) for layer in range(config.num_hidden_layers)),
        LayerSpec("model.norm", "norm", lambda: RmsNorm(size, config.rms_norm_eps)),
        LayerSpec("lm_head", "head", lambda: OutputHead(vocab, size)),
    ]


def _gpt2_layers(config: ModelConfig, seed: int) -> list[LayerSpec]:
    vocab, size = required_vocab_size(config), config.hidden_size

    def positions() -> nn.Module:
        dropout = Dropout(config.hidden_dropout, seed, "transformer.wpe")
        return PositionEmbedding(config.max_position_embeddings, size, dropout)

    def decoder(layer: int) -> LayerSpec:
        prefix = f"transformer.h.{layer}"
        return LayerSpec(prefix, "decoder", lambda: Gpt2Layer(config, layer, seed, prefix))

    return [
        LayerSpec("transformer.wte", "embedding", lambda: TokenEmbedding(vocab, size, None)),
        LayerSpec("transformer.wpe", "embedding", positions),
        *(decoder(layer) for layer in range(config.num_hidden_layers)),
        LayerSpec("transformer.ln_f", "norm", lambda: LayerNorm(size, config.layer_norm_epsilon)),
        LayerSpec("lm_head", "head", lambda: OutputHead(vocab, size)),
    ]


LLAMA = Family(
    build_layers=partial(_llama_layers, head_norms=False),
    splits={
        "embed_tokens": Split("vocab", weight_dim=0),
        "q_proj": Split("column", weight_dim=0, by_heads="query"),
        "k_proj": Split("column", weight_dim=0, by_heads="key_value"),
        "v_proj": Split("column", weight_dim=0, by_heads="key_value"),
        "o_proj": Split("row", weight_dim=1, by_heads="query"),
        "gate_proj": Split("column", weight_dim=0),
        "up_proj": Split("column", weight_dim=0),
        "down_proj": Split("row", weight_dim=1),
        "lm_head": Split("vocab", weight_dim=0),
    },
    residual_projections=("self_attn.o_proj", "mlp.down_proj"),
    rotates=True,
)

QWEN3 = replace(
    LLAMA,
    build_layers=partial(_llama_layers, head_norms=True),
    splits={
        **LLAMA.splits,
        "q_norm": Split("shared", weight_dim=0),
        "k_norm": Split("shared", weight_dim=0),
    },
)

GPT2 = Family(
    build_layers=_gpt2_layers,
    splits={
        "wte": Split("vocab", weight_dim=0),
        "attn.c_attn": Split("column", weight_dim=1, num_parts=3, by_heads="query"),
        "attn.c_proj": Split("row", weight_dim=0, by_heads="query"),
        "mlp.c_fc": Split("column", weight_dim=1),
        "mlp.c_proj": Split("row", weight_dim=0),
        "lm_head": Split("vocab", weight_dim=0),
    },
    residual_projections=("attn.c_proj", "mlp.c_proj"),
    rotates=False,
)

# Mistral's layers are llama's, as long as no attention window is shorter than the context.
FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "mistral": LLAMA, "qwen3": QWEN3, "gpt2": GPT2}

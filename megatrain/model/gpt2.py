"""The gpt2 family: LayerNorm, learned positions, fused query-key-value, GELU. Hugging Face's names and shapes.

B: sequences, T: tokens, C: channels (hidden size), H: heads, D: head dimension, F: MLP width.
Head counts are read off the projections' outputs: the same code runs where a rank holds some of the heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.attention import CoreAttention
from megatrain.model.context import Context
from megatrain.model.dropout import Dropout
from megatrain.model.norm import LayerNorm

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as OpenAI stored it and Hugging Face keeps it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight + bias."""
        return functional.linear(x, self.weight.t(), self.bias)


class Activation(nn.Module):
    """GELU by its tanh approximation: what stands between the MLP's products, without parameters."""

    def forward(self, x_BTF: Tensor) -> Tensor:
        """Element by element."""
        return functional.gelu(x_BTF, approximate="tanh")


class Gpt2Attention(nn.Module):
    """Attention with its projections; c_attn's output is queries, keys and values side by side."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, prefix: str) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        self.c_attn = Conv1D(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, config.hidden_size)
        self.core = CoreAttention(Dropout(config.attention_dropout, seed, f"{prefix}.core", num_offsets=3))

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Mix tokens."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.c_attn(x_BTC).chunk(3, -1))
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        y_BTHD = self.core(q, k, v, context)
        return self.c_proj(y_BTHD.flatten(2))  # type: ignore[no-any-return]


class Gpt2Mlp(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.hidden_size, config.ffn_size)
        self.c_proj = Conv1D(config.ffn_size, config.hidden_size)
        self.activation = Activation()

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Mix channels."""
        return self.c_proj(self.activation(self.c_fc(x_BTC)))  # type: ignore[no-any-return]


class Gpt2Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, prefix: str) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Gpt2Attention(config, layer, seed, f"{prefix}.attn")
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = Gpt2Mlp(config)
        self.attention_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.attention_dropout")
        self.mlp_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.mlp_dropout")

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The residual stream, one layer on."""
        x_BTC = x_BTC + self.attention_dropout(self.attn(self.ln_1(x_BTC), context), context.sample_ids_B)
        return x_BTC + self.mlp_dropout(self.mlp(self.ln_2(x_BTC)), context.sample_ids_B)  # type: ignore[no-any-return]

"""The layers of llama, mistral and qwen3: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Hugging Face's
names and shapes.

B: sequences, T: tokens, C: channels (hidden size), H: query heads, G: key-value heads, D: head dimension, F: MLP width.
Head counts are read off the projections' outputs: the same code runs where a rank holds some of the heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.attention import CoreAttention
from megatrain.model.context import Context
from megatrain.model.dropout import Dropout
from megatrain.model.norm import RmsNorm
from megatrain.model.rope import rotate

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class GatedActivation(nn.Module):
    """silu(gate) * up: what stands between the MLP's products, without parameters."""

    def forward(self, gate_BTF: Tensor, up_BTF: Tensor) -> Tensor:
        """Element by element."""
        return functional.silu(gate_BTF) * up_BTF


class LlamaAttention(nn.Module):
    """Attention with its projections. ``head_norms``: queries and keys are normalised, each head by itself (qwen3)."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, prefix: str, head_norms: bool) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = RmsNorm(self.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()
        self.k_norm = RmsNorm(self.head_dim, config.rms_norm_eps) if head_norms else nn.Identity()
        self.core = CoreAttention(Dropout(config.attention_dropout, seed, f"{prefix}.core", num_offsets=3))

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """Mix tokens."""
        assert context.rotary is not None
        q_BTHD = rotate(self.q_norm(self.q_proj(x_BTC).unflatten(-1, (-1, self.head_dim))), context.rotary)
        k_BTGD = rotate(self.k_norm(self.k_proj(x_BTC).unflatten(-1, (-1, self.head_dim))), context.rotary)
        v_BTGD = self.v_proj(x_BTC).unflatten(-1, (-1, self.head_dim))
        if context.cache is not None:
            k_BTGD, v_BTGD = context.cache.update(self.layer, k_BTGD, v_BTGD)
        y_BTHD = self.core(q_BTHD, k_BTGD, v_BTGD, context)
        return self.o_proj(y_BTHD.flatten(2))  # type: ignore[no-any-return]


class LlamaMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.ffn_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.activation = GatedActivation()

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Mix channels."""
        return self.down_proj(self.activation(self.gate_proj(x_BTC), self.up_proj(x_BTC)))  # type: ignore[no-any-return]


class LlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, layer: int, seed: int, prefix: str, head_norms: bool) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer, seed, f"{prefix}.self_attn", head_norms)
        self.mlp = LlamaMlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.attention_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.attention_dropout")
        self.mlp_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.mlp_dropout")

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The residual stream, one layer on."""
        y_BTC = self.self_attn(self.input_layernorm(x_BTC), context)
        x_BTC = x_BTC + self.attention_dropout(y_BTC, context.sample_ids_B)
        y_BTC = self.mlp(self.post_attention_layernorm(x_BTC))
        return x_BTC + self.mlp_dropout(y_BTC, context.sample_ids_B)  # type: ignore[no-any-return]

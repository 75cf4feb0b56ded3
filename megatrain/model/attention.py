"""The core of attention, without parameters: softmax(q k^T / sqrt(D)) v, by whichever way is fastest where it runs.

B: sequences, T: tokens, S: tokens attended to, H: query heads, G: key-value heads, R: query heads a key-value head, D: head
dimension. Heads come in groups: query head h uses key-value head h // R.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.context import Context
from megatrain.model.dropout import Dropout


class CoreAttention(nn.Module):
    """Causal attention within each sequence, or each document of it; takes as many heads as it is given."""

    # Up to so many tokens, a softmax written out beats the fused kernel in bf16 on a CPU (benchmarks in the README).
    max_written_out_tokens = 1024

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, context: Context) -> Tensor:
        """Attend; [B, T, H, D]."""
        if self.dropout.is_active or self._prefers_written_out(q_BTHD):
            return self._written_out(q_BTHD, k_BSGD, v_BSGD, context)
        if context.document_starts is not None:
            return _variable_length(q_BTHD, k_BSGD, v_BSGD, context.document_starts)
        q_BHTD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        out_BHTD = functional.scaled_dot_product_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            attn_mask=context.mask_B1TS,
            is_causal=context.mask_B1TS is None and q_BTHD.shape[1] > 1,
            enable_gqa=q_BTHD.shape[2] != k_BSGD.shape[2],
        )
        return out_BHTD.transpose(1, 2)

    def _prefers_written_out(self, q_BTHD: Tensor) -> bool:
        is_slow_kernel = q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16
        return is_slow_kernel and q_BTHD.shape[1] <= self.max_written_out_tokens

    def _written_out(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, context: Context) -> Tensor:
        num_sequences, num_tokens, num_heads, dim = q_BTHD.shape
        num_groups = k_BSGD.shape[2]
        # Query heads of one group are laid end to end, so that keys and values are never copied for each of them.
        q_BGXD = (q_BTHD * (1.0 / math.sqrt(dim))).transpose(1, 2).reshape(num_sequences, num_groups, -1, dim)
        scores_BGXS = q_BGXD @ k_BSGD.permute(0, 2, 3, 1)
        scores_BHTS = scores_BGXS.view(num_sequences, num_heads, num_tokens, -1)
        if num_tokens > 1:
            scores_BHTS.add_(self._bias(scores_BHTS, context))
        weights_BHTS = self.dropout(scores_BHTS.softmax(-1), context.sample_ids_B)
        out_BGXD = weights_BHTS.view(scores_BGXS.shape) @ v_BSGD.transpose(1, 2)
        return out_BGXD.view(num_sequences, num_heads, num_tokens, dim).transpose(1, 2)

    @staticmethod
    def _bias(scores_BHTS: Tensor, context: Context) -> Tensor:
        # Added, not filled in: an addition costs nothing in the backward pass.
        num_tokens, num_keys = scores_BHTS.shape[-2:]
        if context.mask_B1TS is not None:
            blank = torch.zeros(context.mask_B1TS.shape, dtype=scores_BHTS.dtype, device=scores_BHTS.device)
            return blank.masked_fill_(~context.mask_B1TS, -math.inf)
        return torch.full((num_tokens, num_keys), -math.inf, dtype=scores_BHTS.dtype, device=scores_BHTS.device).triu_(
            1
        )


def _variable_length(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, document_starts: Tensor) -> Tensor:
    """Flash attention over documents laid end to end: no mask, no work between documents. CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn

    longest = q_BTHD.shape[1]  # an upper bound, known without waiting for the device
    out_XHD = varlen_attn(
        q_BTHD.flatten(0, 1),
        k_BTGD.flatten(0, 1),
        v_BTGD.flatten(0, 1),
        document_starts,
        document_starts,
        longest,
        longest,
        window_size=(-1, 0),
        enable_gqa=q_BTHD.shape[2] != k_BTGD.shape[2],
    )
    assert isinstance(out_XHD, Tensor)
    return out_XHD.view(q_BTHD.shape)

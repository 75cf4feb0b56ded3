"""The core of attention, without parameters: softmax(q k^T / sqrt(D)) v, by whichever way is fastest where it runs.

B: sequences, T: queries, S: keys, H: query heads, G: key-value heads, D: head dimension. Query head h uses key-value
head h // (H / G).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.blockwise_attention import Drop, blockwise_attention
from megatrain.model.context import TORCH_VERSION, Context
from megatrain.model.dropout import Dropout


class CoreAttention(nn.Module):
    """Causal attention within each sequence, or each document of it; takes as many heads as it is given.

    ``window``: how many keys a query sees at the most, the last of them its own; None: all before it. With a cache
    there may be more keys than queries, which are the last ones.
    """

    # Beyond so many tokens the fused kernel is faster on a CPU too, and the probabilities would fill the memory.
    max_blockwise_tokens = 2048

    def __init__(self, dropout: Dropout, window: int | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.window = window

    def forward(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, context: Context) -> Tensor:
        """Attend; [B, T, H, D]."""
        num_queries, window = q_BTHD.shape[1], self.window
        if context.cache is not None:
            visible_B1TS = context.cache.visible(num_queries, window, q_BTHD.device)
            if visible_B1TS is not None:
                return _fused(q_BTHD, k_BSGD, v_BSGD, visible_B1TS)
        if window is not None and num_queries == 1:
            k_BSGD, v_BSGD = k_BSGD[:, -window:], v_BSGD[:, -window:]
        if window is not None and num_queries <= window:
            window = None  # it hides nothing
        is_short = 1 < num_queries <= self.max_blockwise_tokens
        if self.dropout.is_active or (q_BTHD.device.type == "cpu" and is_short):
            return blockwise_attention(q_BTHD, k_BSGD, v_BSGD, context.document_ids_BT, window, self._drop(context))
        if context.document_starts is not None:
            return _variable_length(q_BTHD, k_BSGD, v_BSGD, context.document_starts, window)
        mask = None
        if context.document_ids_BT is not None or window is not None:
            mask = _visible(num_queries, q_BTHD.device, context.document_ids_BT, window)
        return _fused(q_BTHD, k_BSGD, v_BSGD, mask)

    def _drop(self, context: Context) -> Drop | None:
        if not self.dropout.is_active:
            return None
        return lambda weights_BHTS, *first: self.dropout.drop(weights_BHTS, context.sample_ids_B, *first)


def _fused(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's own choice of kernel; causal, or where the mask is True."""
    q_BHTD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    out_BHTD = functional.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        is_causal=mask is None and q_BHTD.shape[2] > 1,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
    )
    return out_BHTD.transpose(1, 2)


def _variable_length(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, document_starts: Tensor, window: int | None
) -> Tensor:
    """Flash attention over documents laid end to end: no mask, no work between documents. CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, for a second

    num_sharing = q_BTHD.shape[2] // k_BTGD.shape[2]
    if num_sharing > 1 and TORCH_VERSION < "2.12":  # whose varlen_attn has no enable_gqa
        k_BTGD, v_BTGD = (x.repeat_interleave(num_sharing, dim=2) for x in (k_BTGD, v_BTGD))
        num_sharing = 1
    attend = partial(varlen_attn, enable_gqa=True) if num_sharing > 1 else varlen_attn
    longest = q_BTHD.shape[1]  # an upper bound, known without waiting for the device
    out_XHD = attend(
        q_BTHD.flatten(0, 1),
        k_BTGD.flatten(0, 1),
        v_BTGD.flatten(0, 1),
        document_starts,
        document_starts,
        longest,
        longest,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(out_XHD, Tensor)
    return out_XHD.view(q_BTHD.shape)


def _visible(num_tokens: int, device: torch.device, document_ids_BT: Tensor | None, window: int | None) -> Tensor:
    """[B or 1, 1, T, T], True where the key is in the query's document and window, and not after it."""
    if document_ids_BT is None:
        visible_BTS = torch.ones((1, num_tokens, num_tokens), dtype=torch.bool, device=device)
    else:
        visible_BTS = document_ids_BT.unsqueeze(2) == document_ids_BT.unsqueeze(1)
    visible_BTS.tril_()
    if window is not None:
        visible_BTS.triu_(1 - window)
    return visible_BTS.unsqueeze(1)

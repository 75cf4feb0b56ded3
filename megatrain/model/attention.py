"""The core of attention, without parameters: softmax(q k^T / sqrt(D)) v, by whichever way is fastest where it runs.

B: sequences, T: queries, S: keys, H: query heads, G: key-value heads, D: head dimension. Query head h uses key-value
head h // (H / G).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from megatrain.model.blockwise_attention import Drop, blockwise_attention
from megatrain.model.context import TORCH_VERSION, Context
from megatrain.model.dropout import Dropout
from megatrain.model.kernels import BACKENDS


class CoreAttention(nn.Module):
    """Attention within each sequence, or each document of it; takes as many heads as it is given.

    ``is_causal``: a query sees no key after its own. ``window``, of causal attention: how many keys a query sees at the
    most, the last of them its own; None: all before it. With a cache there may be more keys than queries, which are the
    last ones. ``kernel``: a name of ``model.attention``; auto:
    blocks of rows on a CPU, else PyTorch's choice.
    """

    # Beyond so many tokens the fused kernel is faster on a CPU too, and the probabilities would fill the memory.
    max_blockwise_tokens = 2048

    def __init__(self, dropout: Dropout, window: int | None = None, *, is_causal: bool = True) -> None:
        super().__init__()
        self.dropout = dropout
        self.is_causal = is_causal
        self.window = window
        self.kernel = "auto"

    def forward(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, context: Context) -> Tensor:
        """Attend; [B, T, H, D]."""
        num_queries, window = q_BTHD.shape[1], self.window
        if context.cache is not None:
            visible_B1TS = context.cache.visible(num_queries, window, q_BTHD.device)
            if visible_B1TS is not None:
                return _fused(q_BTHD, k_BSGD, v_BSGD, visible_B1TS, "auto", is_causal=True)
        if window is not None and num_queries == 1:
            k_BSGD, v_BSGD = k_BSGD[:, -window:], v_BSGD[:, -window:]
        if window is not None and num_queries <= window:
            window = None  # it hides nothing
        is_written_out = self.kernel == "auto" and q_BTHD.device.type == "cpu"
        if self.dropout.is_active or (is_written_out and 1 < num_queries <= self.max_blockwise_tokens):
            settings = window, self._drop(context), self.is_causal
            return blockwise_attention(q_BTHD, k_BSGD, v_BSGD, context.document_ids_BT, *settings)
        if context.document_starts is not None:
            return _variable_length(q_BTHD, k_BSGD, v_BSGD, context.document_starts, window, self.is_causal)
        mask = None
        if context.document_ids_BT is not None or window is not None:
            mask = _visible(num_queries, q_BTHD.device, context.document_ids_BT, window, self.is_causal)
        return _fused(q_BTHD, k_BSGD, v_BSGD, mask, self.kernel, self.is_causal)

    def _drop(self, context: Context) -> Drop | None:
        if not self.dropout.is_active:
            return None
        return lambda weights_BHTS, *first: self.dropout.drop(weights_BHTS, context.sample_ids_B, *first)


def attend_alone(kernel: str, heads: Sequence[Tensor], has_borders: bool, is_causal: bool = True) -> Tensor:
    """A kernel by itself, as kernels.Attend says; two documents, of which the second is one token longer or as long."""
    q_BTHD, k_BTGD, v_BTGD = heads
    if not has_borders:
        return _fused(q_BTHD, k_BTGD, v_BTGD, None, kernel, is_causal)
    num_tokens = q_BTHD.shape[1]
    starts = torch.tensor([0, num_tokens // 2, num_tokens], dtype=torch.int32, device=q_BTHD.device)
    if kernel == "math":
        return _by_borders(q_BTHD, k_BTGD, v_BTGD, starts, None, kernel, is_causal)
    return _variable_length(q_BTHD, k_BTGD, v_BTGD, starts, None, is_causal)


def _fused(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor | None, kernel: str, is_causal: bool) -> Tensor:
    """Where the mask is True; without one all keys, or where it is causal those up to each query."""
    q_BHTD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    attend = partial(
        functional.scaled_dot_product_attention,
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        is_causal=is_causal and mask is None and q_BHTD.shape[2] > 1,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
    )
    if kernel == "auto":
        return attend().transpose(1, 2)
    with sdpa_kernel(BACKENDS[kernel]):
        return attend().transpose(1, 2)


def _variable_length(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, document_starts: Tensor, window: int | None, is_causal: bool
) -> Tensor:
    """Flash attention over documents laid end to end: no mask, no work between documents. CUDA, half precision; on a
    CPU its reference."""
    if q_BTHD.device.type == "cpu":
        return _by_borders(q_BTHD, k_BTGD, v_BTGD, document_starts, window, "auto", is_causal)
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
        window_size=(-1 if window is None else window - 1, 0 if is_causal else -1),
    )
    assert isinstance(out_XHD, Tensor)
    return out_XHD.view(q_BTHD.shape)


def _by_borders(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    document_starts: Tensor,
    window: int | None,
    kernel: str,
    is_causal: bool,
) -> Tensor:
    """What variable-length attention computes, with a mask of all pairs of tokens."""
    q_1XHD, k_1XGD, v_1XGD = (x.flatten(0, 1).unsqueeze(0) for x in (q_BTHD, k_BTGD, v_BTGD))
    num_tokens, device = q_1XHD.shape[1], q_BTHD.device
    # The number of the last document that begins at or before a token; what comes behind the last begins at the end.
    ids_X = torch.bucketize(torch.arange(num_tokens, device=device), document_starts, right=True)
    mask = _visible(num_tokens, device, ids_X.unsqueeze(0), window, is_causal)
    return _fused(q_1XHD, k_1XGD, v_1XGD, mask, kernel, is_causal).view(q_BTHD.shape)


def _visible(
    num_tokens: int, device: torch.device, document_ids_BT: Tensor | None, window: int | None, is_causal: bool
) -> Tensor:
    """[B or 1, 1, T, T], True where the key is in the query's document and window, and where it is causal not after
    it."""
    if document_ids_BT is None:
        visible_BTS = torch.ones((1, num_tokens, num_tokens), dtype=torch.bool, device=device)
    else:
        visible_BTS = document_ids_BT.unsqueeze(2) == document_ids_BT.unsqueeze(1)
    if is_causal:
        visible_BTS.tril_()
    if window is not None:
        visible_BTS.triu_(1 - window)
    return visible_BTS.unsqueeze(1)

"""The core of attention where a mask of all pairs says what is seen: to an encoder's output, and with trained biases.

B: sequences, T: queries, S: keys, H: heads, D: head dimension.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.dropout import Dropout


class MaskedAttention(nn.Module):
    """softmax(scale q k^T + mask) v, for as many heads as it is given.

    ``is_scaled``: the scale is 1 / sqrt(D), else 1.
    """

    def __init__(self, dropout: Dropout, *, is_scaled: bool = True) -> None:
        super().__init__()
        self.dropout = dropout
        self.is_scaled = is_scaled

    def forward(
        self, q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None, sample_ids_B: Tensor | None
    ) -> Tensor:
        """Attend; [B, T, H, D]. ``mask``: broadcasts to [B, H, T, S]; what is added to the scores, minus infinity where
        a key is not seen, whose gradient is computed if it has one. None: all is seen. Each query must see a key."""
        scale = 1.0 / math.sqrt(q_BTHD.shape[-1]) if self.is_scaled else 1.0
        q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
        if not self.dropout.is_active:
            return functional.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, mask, scale=scale).transpose(1, 2)
        scores_BHTS = q_BHTD * scale @ k_BHSD.mT
        if mask is not None:
            scores_BHTS = scores_BHTS + mask
        weights_BHTS = self.dropout.drop(scores_BHTS.softmax(-1), sample_ids_B)
        return (weights_BHTS @ v_BHSD).transpose(1, 2)

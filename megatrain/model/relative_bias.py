"""T5's relative positions: a trained bias of attention's scores for each head and each range of distances.

Raffel et al., "Exploring the Limits of Transfer Learning" (2020), section 2.1; ranges as in Mesh TensorFlow.

B: sequences, T: queries, S: keys, H: heads (this rank's).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class RelativeBias(nn.Module):
    """One table for all layers of a stack. ``is_causal``: keys are never behind their query, else half of the ranges
    are of those that are."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, *, is_causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        self.max_distance = max_distance
        self.is_causal = is_causal

    def forward(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        """[B, H, T, S] for positions [B, T] and [B, S]."""
        distance_BTS = key_positions_BS.unsqueeze(1) - query_positions_BT.unsqueeze(2)
        bucket_BTS = buckets(distance_BTS, self.weight.shape[0], self.max_distance, is_causal=self.is_causal)
        # Laid out as attention's kernels read it; of a view FSDP2 would warn.
        return functional.embedding(bucket_BTS, self.weight).permute(0, 3, 1, 2).contiguous()


def buckets(distance: Tensor, num_buckets: int, max_distance: int, *, is_causal: bool) -> Tensor:
    """The range that each distance (key's position - query's) is in.

    Half of the ranges are of one distance each, the others grow up to ``max_distance``, all in logarithms.
    """
    first = torch.zeros_like(distance)
    if not is_causal:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
    distance = (-distance).clamp(min=0) if is_causal else distance.abs()
    num_exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    larger = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < num_exact, distance, larger)

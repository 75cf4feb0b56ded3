"""Normalisation of each token, as layers: the last one stands in the stack by itself, between decoder layers and head.

B: sequences, T: tokens, C: channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.context import Context


class RmsNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BTC: Tensor, context: Context | None = None) -> Tensor:
        """Normalise each token; the context is not used."""
        return functional.rms_norm(x_BTC, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / standard deviation * weight + bias (Ba et al. 2016), computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BTC: Tensor, context: Context | None = None) -> Tensor:
        """Normalise each token; the context is not used."""
        return functional.layer_norm(x_BTC, self.weight.shape, self.weight, self.bias, self.eps)

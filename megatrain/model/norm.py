"""Normalisation of each token, as layers: the last one stands in the stack by itself, between decoder layers and head.

B: sequences, T: tokens, C: channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.context import Context


class RmsNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), computed in fp32."""

    has_own_cpu_kernel = True  # False: what a GPU runs, on a CPU too

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_BTC: Tensor, context: Context | None = None) -> Tensor:
        """Normalise each token; the context is not used."""
        if self.has_own_cpu_kernel and x_BTC.device.type == "cpu" and not torch.compiler.is_compiling():
            y_BTC: Tensor = _RmsNormOnCpu.apply(x_BTC, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y_BTC
        return functional.rms_norm(x_BTC, self.weight.shape, self.weight, self.eps)


class _RmsNormOnCpu(torch.autograd.Function):
    """What functional.rms_norm computes; that has no fused kernel on a CPU: it is slow there, and saves fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        norm_BT1 = torch.linalg.vector_norm(x_BTC, dim=-1, keepdim=True, dtype=torch.float32)
        scale_BT1 = norm_BT1.square_().div_(x_BTC.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BTC, weight_C, scale_BT1)
        y_BTC: Tensor = (x_BTC * scale_BT1).mul_(weight_C).to(x_BTC.dtype)
        return y_BTC

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_BTC, weight_C, scale_BT1 = ctx.saved_tensors
        normed_BTC = x_BTC * scale_BT1  # fp32, as scale_BT1 is
        grad_weight_C = None
        if ctx.needs_input_grad[1]:
            grad_weight_C = (normed_BTC * grad_BTC).flatten(0, -2).sum(0).to(weight_C.dtype)
        grad_normed_BTC = grad_BTC.float() * weight_C
        # The norm's own change takes away the part of the gradient that points along the normalised vector.
        along_BT1 = (grad_normed_BTC * normed_BTC).mean(-1, keepdim=True)
        grad_normed_BTC.sub_(normed_BTC.mul_(along_BT1)).mul_(scale_BT1)
        return grad_normed_BTC.to(x_BTC.dtype), grad_weight_C, None


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

"""Matrix products cut among tensor ranks, with the messages that stand before and after them.

A block's column-parallel layers share one input, so that they are one function here. Its backward pass sends the
input's gradient while it computes the weights'; with sequence parallelism it gathers the input again, which is kept as
this rank's tokens alone (Korthikanti et al. 2022, section 4.2.2).

B: sequences, T: tokens, C: channels, F: a layer's outputs on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatrain.fp32 import scaled
from megatrain.parallel.collectives import (
    all_gather_sequence,
    begin_all_gather_sequence,
    begin_all_reduce,
    begin_reduce_scatter_sequence,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


@dataclass(frozen=True)
class Region:
    """Where column-parallel layers begin and row-parallel ones end. ``is_sequence_parallel``: what is outside is this
    rank's tokens, else all."""

    group: dist.ProcessGroup
    is_sequence_parallel: bool

    def whole(self, x_BTC: Tensor) -> Tensor:
        """The input with the tokens of all ranks."""
        return all_gather_sequence(x_BTC, self.group) if self.is_sequence_parallel else x_BTC

    def reduce(self, y_BTC: Tensor) -> Tensor:
        """Where row-parallel layers end: the sum of their products, with sequence parallelism of this rank's tokens."""
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.is_sequence_parallel
            else reduce_from_tensor_parallel_region
        )
        return reduce(y_BTC, self.group)

    def gradients(
        self,
        grads_BTF: Sequence[Tensor],
        x_BTC: Tensor,
        weights_FC: Sequence[Tensor],
        needs: Sequence[bool],
        scale: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Those of the input, summed over the group, and of each weight, where ``needs`` asks for them.

        ``grads_BTF``: of the products of all tokens with each weight. ``scale``: a factor of the result.
        """
        needs_x, *needs_weights = needs
        gathering = None
        if self.is_sequence_parallel and any(needs_weights):
            gathering = begin_all_gather_sequence(x_BTC, self.group)
        summing = None
        if needs_x:
            grad_BTC = grads_BTF[0] @ weights_FC[0]
            for grad_BTF, weight_FC in zip(grads_BTF[1:], weights_FC[1:], strict=True):
                grad_BTC.flatten(0, 1).addmm_(grad_BTF.flatten(0, 1), weight_FC)
            begin_sum = begin_reduce_scatter_sequence if self.is_sequence_parallel else begin_all_reduce
            summing = begin_sum(scaled(grad_BTC, scale), self.group)
        found: list[Tensor | None] = [None] * len(weights_FC)
        if any(needs_weights):
            whole_NC = scaled(gathering() if gathering else x_BTC, scale).flatten(0, 1)
            for index, grad_BTF in enumerate(grads_BTF):
                if needs_weights[index]:
                    found[index] = grad_BTF.flatten(0, 1).t() @ whole_NC
        return [summing() if summing else None, *found]


class ColumnParallel:
    """Computes the products of a block's input with its first matrices, each of which holds some of the outputs."""

    def __init__(self, region: Region) -> None:
        self._region = region

    def __call__(self, linears: Sequence[Any], x_BTC: Tensor, sample_ids_B: Tensor | None) -> tuple[Tensor, ...]:
        """A product [B, T, F] for each matrix; of all tokens, where ``x_BTC`` has this rank's. None has an adapter."""
        weights = [linear.weight.t() if linear.is_conv1d else linear.weight for linear in linears]
        products: tuple[Tensor, ...] = _ColumnParallel.apply(  # type: ignore[no-untyped-call]
            x_BTC, self._region, *weights, *(linear.bias for linear in linears)
        )
        return products


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Named arguments beside a variable number: where one is given for each name, the compiler takes ctx for none.
        x_BTC, region, *weights_and_biases = arguments
        count = len(weights_and_biases) // 2
        weights_FC, biases_F = weights_and_biases[:count], weights_and_biases[count:]
        ctx.region = region
        ctx.save_for_backward(x_BTC, *weights_FC)
        whole_BTC = region.whole(x_BTC)
        return tuple(
            functional.linear(whole_BTC, weight_FC, bias_F)
            for weight_FC, bias_F in zip(weights_FC, biases_F, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads_BTF: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, *weights_FC = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        count = len(weights_FC)
        grad_x_BTC, *grad_weights_FC = ctx.region.gradients(grads_BTF, x_BTC, weights_FC, [needs_x, *needs[:count]])
        grad_biases_F = [
            grad_BTF.sum((0, 1)) if needs_bias else None
            for grad_BTF, needs_bias in zip(grads_BTF, needs[count:], strict=True)
        ]
        return grad_x_BTC, None, *grad_weights_FC, *grad_biases_F

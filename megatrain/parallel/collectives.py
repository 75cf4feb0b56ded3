"""Collectives that autograd knows: what a tensor-parallel layer does where it meets the rest of the model.

Each takes the group it speaks to. Their backward passes are one another's forward passes (Megatron-LM's f and g, and
the sequence-parallel pair of Korthikanti et al. 2022).

B: sequences, T: tokens, C: channels; a sequence shard has T / t of the tokens, t being the group's size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copy_to_tensor_parallel_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity; its gradient is summed over the group. Before a column-parallel layer."""
    return _Copy.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_from_tensor_parallel_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce; its gradient is passed on as it is. After a row-parallel layer."""
    return _Sum.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_from_sequence_parallel_region(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather the shards of the sequence; its gradient is reduce-scattered. Before a column-parallel layer."""
    return _GatherSequence.apply(x_BTC, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_scatter_to_sequence_parallel_region(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Reduce-scatter to shards of the sequence; its gradient is all-gathered. After a row-parallel layer."""
    return _ScatterSum.apply(x_BTC, group)  # type: ignore[no-any-return, no-untyped-call]


def scatter_to_sequence_parallel_region(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of a sequence that all ranks have alike; its gradient is all-gathered."""
    return _Split.apply(x_BTC, group)  # type: ignore[no-any-return, no-untyped-call]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x_BTC, group)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad_BTC, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x_BTC, group)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_BTC, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        # A copy: a view would keep the whole sequence alive.
        return x_BTC.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)].clone(
            memory_format=torch.contiguous_format
        )

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_BTC, ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    shards = x_BTC.new_empty((size * x_BTC.shape[0], *x_BTC.shape[1:]))
    dist.all_gather_into_tensor(shards, x_BTC.contiguous(), group=group)
    return shards.view(size, *x_BTC.shape).transpose(0, 1).flatten(1, 2)


def _reduce_scatter(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    shards = torch.cat(x_BTC.chunk(size, 1))  # shard by shard: the order in which they are scattered
    shard = torch.empty_like(shards[: x_BTC.shape[0]])
    dist.reduce_scatter_tensor(shard, shards, group=group)
    return shard

"""Collectives that autograd knows: what a tensor-parallel layer does where it meets the rest of the model.

Each takes the group it speaks to. Their backward passes are one another's forward passes (Megatron-LM's f and g, and
the sequence-parallel pair of Korthikanti et al. 2022).

B: sequences, T: tokens, C: channels; a sequence shard has T / t of the tokens, t being the group's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Pending = Callable[[], Tensor]
"""A message on its way: waits for it, and returns what it brought."""


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


def gather_alike_from_sequence_parallel_region(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather the shards of the sequence, where all ranks go on with the whole alike; its gradient, which is then
    alike too, is split."""
    return _GatherAlike.apply(x_BTC, group)  # type: ignore[no-any-return, no-untyped-call]


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
        return all_gather_sequence(x_BTC, group)

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
        return all_gather_sequence(grad_BTC, ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _own_shard(x_BTC, group)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad_BTC, ctx.group), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_sequence(x_BTC, group)

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, None]:
        return _own_shard(grad_BTC, ctx.group), None


def all_gather_sequence(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The shards of all ranks, one behind the other. Without a gradient."""
    return begin_all_gather_sequence(x_BTC, group)()


def begin_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Sum ``x`` over the group, in its own memory where it is contiguous."""
    total = x.contiguous()
    return _pending(dist.all_reduce(total, group=group, async_op=_overlaps()), lambda: total)


def begin_all_gather_sequence(x_BTC: Tensor, group: dist.ProcessGroup) -> Pending:
    """The shards of all ranks, one behind the other."""
    size = dist.get_world_size(group)
    shards = x_BTC.new_empty((size * x_BTC.shape[0], *x_BTC.shape[1:]))
    work = dist.all_gather_into_tensor(shards, x_BTC.contiguous(), group=group, async_op=_overlaps())
    return _pending(work, lambda: shards.view(size, *x_BTC.shape).transpose(0, 1).flatten(1, 2))


def begin_reduce_scatter_sequence(x_BTC: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over the group, of this rank's shard."""
    shards = torch.cat(x_BTC.chunk(dist.get_world_size(group), 1))  # the order in which they are scattered
    shard = torch.empty_like(shards[: x_BTC.shape[0]])
    work = dist.reduce_scatter_tensor(shard, shards, group=group, async_op=_overlaps())
    return _pending(work, lambda: shard)


def _own_shard(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy: a view would keep the whole sequence alive.
    shards = x_BTC.chunk(dist.get_world_size(group), 1)
    return shards[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


def _pending(work: dist.Work | None, result: Pending) -> Pending:
    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return result()

    return finish


def _overlaps() -> bool:
    # Torch's compiler has no graph for an asynchronous collective; it orders messages and products by itself.
    return not torch.compiler.is_compiling()


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return begin_all_reduce(x.clone(memory_format=torch.contiguous_format), group)()


def _reduce_scatter(x_BTC: Tensor, group: dist.ProcessGroup) -> Tensor:
    return begin_reduce_scatter_sequence(x_BTC, group)()

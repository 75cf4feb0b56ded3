"""Tensor and sequence parallelism: a model that was written for one device, cut by the table beside its family.

Column-parallel layers hold some of the outputs, row-parallel layers some of the inputs, embedding and head some of the
vocabulary (Shoeybi et al. 2019, Megatron-LM). What communicates stands where these meet the rest: before a block that
begins with column-parallel layers, after the row-parallel layer that ends it. With sequence parallelism (Korthikanti et
al. 2022) all between blocks is computed on 1/t of the tokens.

B: sequences, T: tokens, N: B * T, C: channels, V: vocabulary (this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatrain.distributed.fragment import ShardSpec, TensorSlice
from megatrain.distributed.groups import Groups
from megatrain.families.description import Split
from megatrain.parallel.collectives import (
    copy_to_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatrain.parallel.vocab import VocabParallelEmbedding, VocabParallelHead


@dataclass(frozen=True)
class HeadCounts:
    """The attention heads of the whole model."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A rank's part of one parameter: where it lies, and how many tensor ranks hold the same part.

    ``replica``: this rank's number among those. ``partial``: each of them sees a part of its gradient.
    """

    spec: ShardSpec
    num_replicas: int
    replica: int
    partial: bool = False


@dataclass(frozen=True)
class TensorParallelRank:
    """The ranks that share each layer's matrices.

    ``kv_replica_group``: those of them that hold the same key-value head as this one. ``sequence``: whether tokens
    between blocks are split too, of which there are ``seq_len``.
    """

    group: dist.ProcessGroup
    kv_replica_group: dist.ProcessGroup
    sequence: bool
    seq_len: int

    @classmethod
    def of(cls, groups: Groups, heads: HeadCounts, *, sequence: bool, seq_len: int) -> TensorParallelRank:
        """Find the sharers of heads; collective over the world where there are any."""
        num_sharers = groups.topology.tensor // heads.key_value
        if num_sharers < 2:
            return cls(groups.tensor, groups.self_group, sequence, seq_len)
        first = groups.coordinate.tensor // num_sharers * num_sharers
        sharers = groups.topology.group(groups.rank, "tensor")[first : first + num_sharers]
        return cls(groups.tensor, dist.new_group(sharers, use_local_synchronization=True), sequence, seq_len)

    @property
    def size(self) -> int:
        """Their number."""
        return dist.get_world_size(self.group)

    @property
    def index(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.group)


def split_model(
    model: nn.Module,
    split_of: Callable[[str], Split | None],
    heads: HeadCounts,
    ranks: TensorParallelRank,
    decoder_names: list[str],
) -> dict[str, Shard]:
    """Cut ``model`` (on the meta device) in place to this rank's part; each parameter's shard, by its name.

    ``split_of``: the family's table, by a module's name. ``decoder_names``: the decoder layers of the whole model that
    are in this one.
    """
    shards: dict[str, Shard] = {}
    blocks: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        split = split_of(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            path = f"{name}.{key}"
            shard = _shard(path, parameter, split, key, heads, ranks)
            shards[path] = shard
            module.register_parameter(key, nn.Parameter(parameter.new_empty(shard.spec.local_shape)))
        if split is None or split.kind == "shared":
            continue
        parent_name = name.rpartition(".")[0]
        if split.kind == "column":
            blocks[parent_name] = model.get_submodule(parent_name)
        elif split.kind == "row":
            model.set_submodule(name, RowParallel(module, split.weight_dim, ranks))
        else:
            kind = VocabParallelHead if _is_head(module) else VocabParallelEmbedding
            model.set_submodule(name, kind(module, shards[f"{name}.weight"].spec, ranks.group))
            if kind is VocabParallelHead:
                blocks[name] = model.get_submodule(name)
    for block in blocks.values():
        _before(
            block,
            gather_from_sequence_parallel_region if ranks.sequence else copy_to_tensor_parallel_region,
            ranks.group,
        )
    if ranks.sequence and decoder_names and decoder_names[0].endswith(".0"):
        _before(model.get_submodule(decoder_names[0]), scatter_to_sequence_parallel_region, ranks.group)
    _place_dropout(model, heads, ranks, decoder_names)
    return shards


def mark_parameters(
    parameters: Mapping[str, nn.Parameter],
    shards: Mapping[str, Shard],
    ranks: TensorParallelRank,
    embedding_names: list[str],
) -> None:
    """Say of each parameter whether this rank counts it in the gradient's norm, and sum gradients that are partial.

    Under sequence parallelism those of all whole parameters are, but for the embeddings (``embedding_names``): they are
    applied to this rank's tokens alone.
    """
    for name, parameter in parameters.items():
        shard = shards[name]
        # DeepSpeed counts a parameter on the first tensor rank alone, unless it is marked.
        parameter.model_parallel = shard.num_replicas < ranks.size and shard.replica == 0  # type: ignore[attr-defined]
        if shard.partial:
            _sum_gradients(parameter, ranks.group if shard.num_replicas == ranks.size else ranks.kv_replica_group)
        elif ranks.sequence and shard.num_replicas > 1 and name.rpartition(".")[0] not in embedding_names:
            _sum_gradients(parameter, ranks.group)


def _sum_gradients(parameter: Tensor, group: dist.ProcessGroup) -> None:
    def hook(grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    parameter.register_hook(hook)  # type: ignore[no-untyped-call]


class RowParallel(nn.Module):
    """A linear layer over this rank's part of the inputs; the products are summed over the ranks, then the bias added.

    ``weight_dim``: the dimension of the weight along which inputs lie (1 in a Linear, 0 in a Conv1D).
    """

    def __init__(self, linear: Any, weight_dim: int, ranks: TensorParallelRank) -> None:
        super().__init__()
        self.weight: nn.Parameter = linear.weight
        self.bias: nn.Parameter | None = linear.bias
        self._weight_dim = weight_dim
        self._ranks = ranks

    def forward(self, x_BTC: Tensor) -> Tensor:
        """The whole sum; under sequence parallelism, of this rank's tokens."""
        weight = self.weight if self._weight_dim == 1 else self.weight.t()
        partial_BTC = functional.linear(x_BTC, weight)
        reduce = (
            reduce_scatter_to_sequence_parallel_region if self._ranks.sequence else reduce_from_tensor_parallel_region
        )
        y_BTC = reduce(partial_BTC, self._ranks.group)
        return y_BTC if self.bias is None else y_BTC + self.bias


def _shard(
    path: str, parameter: Tensor, split: Split | None, key: str, heads: HeadCounts, ranks: TensorParallelRank
) -> Shard:
    shape = tuple(parameter.shape)
    whole = Shard(ShardSpec.whole(path, shape), ranks.size, ranks.index)
    if split is None or (key == "bias" and split.kind == "row"):
        return whole
    if split.kind == "shared":
        return replace(whole, partial=True)
    dim = 0 if key == "bias" else split.weight_dim
    if split.kind == "vocab":
        per_rank = -(-shape[dim] // ranks.size)
        first = min(ranks.index * per_rank, shape[dim])
        count = min(per_rank, shape[dim] - first)
        slices: tuple[TensorSlice, ...] = (_slice(shape, dim, first, count),) if count else ()
        return Shard(ShardSpec(path, shape, slices, dim, per_rank - count), 1, 0)
    part = shape[dim] // split.num_parts
    num_replicas, index, count = 1, ranks.index, part // ranks.size
    if split.by_heads == "key_value" and heads.key_value < ranks.size:  # several ranks share a head
        num_replicas = ranks.size // heads.key_value
        index, count = ranks.index // num_replicas, heads.size
    slices = tuple(_slice(shape, dim, number * part + index * count, count) for number in range(split.num_parts))
    return Shard(ShardSpec(path, shape, slices, dim), num_replicas, ranks.index % num_replicas, num_replicas > 1)


def _slice(shape: tuple[int, ...], dim: int, first: int, count: int) -> TensorSlice:
    offset = tuple(first if d == dim else 0 for d in range(len(shape)))
    return TensorSlice(offset, tuple(count if d == dim else size for d, size in enumerate(shape)))


def _is_head(module: nn.Module) -> bool:
    return hasattr(module, "loss_sum")


def _before(module: nn.Module, collective: Callable[..., Tensor], group: dist.ProcessGroup) -> None:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (collective(arguments[0], group), *arguments[1:])

    module.register_forward_pre_hook(hook)


def _place_dropout(model: nn.Module, heads: HeadCounts, ranks: TensorParallelRank, decoder_names: list[str]) -> None:
    """Tell each dropout which part of the whole activation it sees, so that it drops what one process would."""
    for name in decoder_names:
        for module in model.get_submodule(name).modules():
            offsets = getattr(module, "offsets", None)
            if offsets is not None and len(offsets) == 3:
                module.offsets = (ranks.index * (heads.query // ranks.size), 0, 0)  # type: ignore[assignment]
            elif offsets is not None and ranks.sequence:
                module.offsets = (ranks.index * (ranks.seq_len // ranks.size), 0)  # type: ignore[assignment]

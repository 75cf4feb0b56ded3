"""Tensor and sequence parallelism: a model that was written for one device, cut by the table beside its family.

Column-parallel layers hold some of the outputs, row-parallel layers some of the inputs, embedding and head some of the
vocabulary (Shoeybi et al. 2019, Megatron-LM). What communicates stands where these meet the rest: before a block that
begins with column-parallel layers, after the row-parallel layer that ends it. With sequence parallelism (Korthikanti et
al. 2022) all between blocks is computed on 1/t of the tokens.

B: sequences, T: tokens, N: B * T, C: channels, V: vocabulary (this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config import ModelConfig, RunConfig
from megatrain.distributed.fragment import ShardSpec, TensorSlice
from megatrain.distributed.groups import Groups
from megatrain.families.description import Split
from megatrain.parallel.collectives import (
    copy_to_tensor_parallel_region,
    gather_alike_from_sequence_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatrain.parallel.linear import ColumnParallel, Region
from megatrain.parallel.vocab import VocabParallelEmbedding, VocabParallelHead


def split_model(model: Any, config: RunConfig, groups: Groups) -> dict[str, ShardSpec]:
    """Cut ``model`` (a DecoderStage on the meta device) in place; each parameter's spec, by name."""
    specs: dict[str, ShardSpec] = {}
    region = Region(groups.tensor, config.parallel.sequence)
    # Where targets are picked from the sequences of all ranks, the head's input is whole on each of them.
    head_region = region if model.pick is None else Region(groups.tensor, is_sequence_parallel=False)
    for name, module in list(model.named_modules()):
        split = config.model.description.split_of(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            path = f"{name}.{key}"
            specs[path] = _shard_spec(path, parameter, split, config.model, groups)
            empty = parameter.new_empty(specs[path].local_shape)
            module.register_parameter(key, nn.Parameter(empty, parameter.requires_grad))
        if split is None or split.kind in ("shared", "factor", "heads"):
            continue
        if split.kind == "row":
            module.reduce = region.reduce
        elif split.kind == "vocab":
            cut = (VocabParallelHead, head_region) if name == model.head_name else (VocabParallelEmbedding, region)
            model.set_submodule(name, cut[0](module, specs[f"{name}.weight"], cut[1]))
    for block in [module for module in model.modules() if hasattr(module, "project")]:
        _begin_block(block, region, config)
    for name in model.decoder_names if region.is_sequence_parallel else ():
        if name.endswith(".0"):  # the first of a stack
            _before(model.get_submodule(name), scatter_to_sequence_parallel_region, region.group)
    if region.is_sequence_parallel and model.pick is not None:
        _before(model.pick, gather_alike_from_sequence_parallel_region, region.group)
    if hasattr(model, "share"):
        model.share = partial(_entry(region), group=region.group)
    _set_dropout_offsets(model, config, groups)
    return specs


def partial_gradients(chunks: Sequence[Any], specs: Mapping[str, ShardSpec], config: RunConfig) -> set[str]:
    """The parameters that several tensor ranks hold alike while each computes a part of the gradient.

    Under sequence parallelism those are all whole parameters but for the embeddings and what transforms the head's
    input: the others are applied to this rank's tokens alone.
    """
    outer = [name for model in chunks for name in (*model.embedding_names, model.transform_name) if name is not None]
    applied_to_all = tuple(f"{name}." for name in outer)
    on_tokens = {name for name, spec in specs.items() if spec.num_replicas > 1 and not name.startswith(applied_to_all)}
    parts = {name for name, spec in specs.items() if spec.is_partial_grad}
    return parts | on_tokens if config.parallel.sequence else parts


class PartialGradients:
    """Parts of gradients that add up here, in fp32, over a step's micro-batches, to be summed over ``group`` in one
    message. Autograd passes zeros on in their place, until they are summed. ``sizes``: elements of each parameter."""

    def __init__(self, sizes: Mapping[nn.Parameter, int], group: dist.ProcessGroup, device: torch.device) -> None:
        self.parameters, self._group = list(sizes), group
        self._flat = torch.zeros(sum(sizes.values()), device=device)
        self._parts = torch.split(self._flat, [*sizes.values()])
        self._is_summed = False
        for parameter, part in zip(sizes, self._parts, strict=True):
            parameter.register_hook(partial(self._keep, part))  # type: ignore[no-untyped-call]

    def begin_step(self) -> None:
        self._flat.zero_()
        self._is_summed = False

    def sum(self) -> Sequence[Tensor]:
        """Of each parameter, flat. What is computed from now on passes by."""
        dist.all_reduce(self._flat, group=self._group)
        self._is_summed = True
        return self._parts

    def _keep(self, part: Tensor, gradient: Tensor) -> Tensor:
        if self._is_summed:
            return gradient
        part += gradient.reshape(-1)
        return torch.zeros_like(gradient)


def _shard_spec(path: str, parameter: Tensor, split: Split | None, model: ModelConfig, groups: Groups) -> ShardSpec:
    shape, size, index = tuple(parameter.shape), groups.topology.tensor, groups.coordinate.tensor
    is_bias = path.endswith(".bias")
    whole = replace(ShardSpec.whole(path, shape), num_replicas=size, replica=index)
    if split is None or (is_bias and split.kind == "row"):
        return whole
    if split.kind == "shared":
        return replace(whole, is_partial_grad=True)
    dim = 0 if is_bias else split.weight_dim
    if split.kind == "vocab":
        per_rank = -(-shape[dim] // size)
        first = min(index * per_rank, shape[dim])
        count = min(per_rank, shape[dim] - first)
        rows = (_slice(shape, dim, first, count),) if count else ()
        return ShardSpec(path, shape, rows, dim, per_rank - count)
    part = shape[dim] // split.num_parts
    num_replicas, replica, count = 1, 0, part // size
    if split.by_heads == "key_value" and model.kv_heads < size:  # several ranks share a head
        num_replicas = size // model.kv_heads
        index, replica = divmod(index, num_replicas)
        count = model.head_size
    slices = tuple(_slice(shape, dim, number * part + index * count, count) for number in range(split.num_parts))
    return ShardSpec(
        path, shape, slices, dim, num_replicas=num_replicas, replica=replica, is_partial_grad=num_replicas > 1
    )


def _slice(shape: tuple[int, ...], dim: int, first: int, count: int) -> TensorSlice:
    offset = tuple(first if d == dim else 0 for d in range(len(shape)))
    return TensorSlice(offset, tuple(count if d == dim else size for d, size in enumerate(shape)))


def _begin_block(block: Any, region: Region, config: RunConfig) -> None:
    """Have the input of a block's column-parallel layers made whole, and its gradient summed."""
    if config.gathers_by_layer:
        _before(block, _entry(region), region.group)
    else:
        block.project = ColumnParallel(region)


def _entry(region: Region) -> Callable[..., Tensor]:
    """What makes the input of column-parallel layers whole, and sums its gradient."""
    return gather_from_sequence_parallel_region if region.is_sequence_parallel else copy_to_tensor_parallel_region


def _before(module: nn.Module, collective: Callable[..., Tensor], group: dist.ProcessGroup) -> None:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (collective(arguments[0], group), *arguments[1:])

    module.register_forward_pre_hook(hook)


def _set_dropout_offsets(model: Any, config: RunConfig, groups: Groups) -> None:
    """Where in the whole activation each dropout's slice begins, so that it drops what one process would."""
    size, index = groups.topology.tensor, groups.coordinate.tensor
    first_head = index * (config.model.num_attention_heads // size)
    decoder = config.model.description.block.prefix
    for name in model.decoder_names:
        num_tokens = config.target_len if name.startswith(f"{decoder}.") else None
        first_token = index * ((num_tokens or config.data.seq_len) // size) if config.parallel.sequence else 0
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            if not hasattr(module, "offsets"):
                continue
            parent = path.rpartition(".")[0]
            adapted = config.model.description.split_of(parent)
            if adapted is not None:  # of an adapter, whose inputs are all tokens, and on a cut matrix a part of each
                is_cut = adapted.kind == "row"
                module.offsets = (0, index * model.get_submodule(f"{parent}.lora_A").weight.shape[1] * is_cut)
            else:
                module.offsets = (first_head, 0, 0) if len(module.offsets) == 3 else (first_token, 0)

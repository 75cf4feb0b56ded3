"""This rank's part of a model: the parameters it holds, where each lies in the whole, in memory and not yet filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megatrain.config import RunConfig
from megatrain.distributed.fragment import ShardSpec
from megatrain.distributed.groups import Groups
from megatrain.families.description import Split
from megatrain.parallel.deepspeed_config import offload_settings
from megatrain.parallel.deepspeed_engine import DeepSpeedMPU
from megatrain.parallel.recompute import recompute_cores, recompute_layers
from megatrain.parallel.tensor import HeadCounts, Shard, TensorParallelRank, mark_parameters, split_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank. ``spec``: where it lies in the whole.

    ``num_replicas`` ranks along the tensor axis hold the same, this one as number ``replica``. ``is_copy``: another
    pipeline stage holds the same tied weight and speaks for it.
    """

    parameter: nn.Parameter
    spec: ShardSpec
    num_replicas: int
    replica: int
    is_copy: bool = False


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model; its parameters, tied ones once. ``kv_replica_group``: see TensorParallelRank."""

    module: nn.Module
    parameters: Mapping[str, LocalParameter]
    kv_replica_group: dist.ProcessGroup


Model: TypeAlias = Any
"""A module that tells of its layers by name: megatrain.model.decoder.DecoderStage, which this package does not know."""


@dataclass(frozen=True)
class ModelPartition:
    """How a family is cut: its table by a module's name, and the types that selective recomputation recomputes."""

    split_of: Callable[[str], Split | None]
    cores: tuple[type[nn.Module], ...]


def shard_model(model: Model, config: RunConfig, groups: Groups, cut: ModelPartition) -> ShardedModel:
    """ModelPartition a model that was built on the meta device to this rank's part, and give that its memory."""
    heads = HeadCounts(config.model.num_attention_heads, config.model.kv_heads, config.model.head_size)
    ranks = TensorParallelRank.of(groups, heads, sequence=config.parallel.sequence, seq_len=config.data.seq_len)
    if ranks.size > 1:
        shards = split_model(model, cut.split_of, heads, ranks, model.decoder_names)
    else:
        whole = {name: ShardSpec.whole(name, parameter.shape) for name, parameter in model.named_parameters()}
        shards = {name: Shard(spec, 1, 0) for name, spec in whole.items()}
    layers = [model.get_submodule(name) for name in model.decoder_names]
    if config.parallel.recompute == "full":
        recompute_layers(layers, config.parallel.recompute_every)
    elif config.parallel.recompute == "selective":
        recompute_cores(layers, cut.cores)
    _allocate(model, config, groups)
    parameters = dict(model.named_parameters())
    mark_parameters(parameters, shards, ranks, model.embedding_names)
    mine = {
        name: LocalParameter(parameter, shards[name].spec, shards[name].num_replicas, shards[name].replica)
        for name, parameter in parameters.items()
    }
    return ShardedModel(model, mine, ranks.kv_replica_group)


def tie_across_stages(model: ShardedModel, head: str, embedding: str) -> ShardedModel:
    """Let the head of the last stage stand for the embedding's weight, which the first stage speaks for."""
    name = f"{head}.weight"
    local = model.parameters[name]
    spec = dataclasses.replace(local.spec, name=f"{embedding}.weight")
    copy = dataclasses.replace(local, spec=spec, is_copy=True)
    return dataclasses.replace(model, parameters={**model.parameters, name: copy})


def _allocate(model: Model, config: RunConfig, groups: Groups) -> None:
    """Memory for every parameter; under ZeRO 3 each module's is cut among the data ranks at once."""
    dtype = DTYPES[config.train.precision]
    model.to(dtype)
    if config.parallel.zero_stage < 3:
        model.to_empty(device=groups.device)
        model.tie_weights()
        return
    model.tie_weights()
    given = config.deepspeed.get("zero_optimization", {})  # some of its keys are read here, not by the engine
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **offload_settings(config), **given}  # type: ignore[dict-item]
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    for name, module in list(model.named_modules()):
        if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue
        if name == model.head_name:  # a tied head takes the embedding's weight, which is there by now
            model.tie_weights()
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=groups.device, recurse=False)
            deepspeed.zero.Init(
                module=module,
                data_parallel_group=groups.data,
                config_dict_or_path=settings,
                dtype=dtype,
                mpu=DeepSpeedMPU(groups),
            )

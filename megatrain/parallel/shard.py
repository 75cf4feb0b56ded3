"""This rank's part of a model: the parameters it holds, where each lies in the whole; allocated, not yet filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import deepspeed
import torch
from torch import nn

from megatrain.config import RunConfig
from megatrain.distributed.fragment import ShardSpec
from megatrain.distributed.groups import Groups
from megatrain.parallel.deepspeed_config import offload_settings
from megatrain.parallel.mpu import DeepSpeedMPU
from megatrain.parallel.recompute import recompute_cores, recompute_layers
from megatrain.parallel.tensor import mark_parameters, split_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model; its parameters, tied ones once, and by the same names what each holds."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    specs: Mapping[str, ShardSpec]


Model: TypeAlias = Any
"""A module that tells of its layers by name: megatrain.model.decoder.DecoderStage, which this package does not know."""


def shard_model(
    model: Model, config: RunConfig, groups: Groups, recomputed: tuple[type[nn.Module], ...]
) -> ShardedModel:
    """Cut a model that was built on the meta device to this rank's part, and give that its memory.

    ``recomputed``: the types that selective recomputation recomputes.
    """
    if groups.topology.tensor > 1:
        specs = split_model(model, config, groups)
    else:
        specs = {name: ShardSpec.whole(name, parameter.shape) for name, parameter in model.named_parameters()}
    layers = [model.get_submodule(name) for name in model.decoder_names]
    if config.parallel.recompute == "full":
        recompute_layers(layers, config.parallel.recompute_every)
    elif config.parallel.recompute == "selective":
        recompute_cores(layers, recomputed)
    _allocate(model, config, groups)
    mark_parameters(model, specs, config, groups)
    parameters = dict(model.named_parameters())
    return ShardedModel(model, parameters, {name: specs[name] for name in parameters})


def tie_across_stages(model: ShardedModel, head: str, embedding: str) -> ShardedModel:
    """Let the head of the last stage stand for the embedding's weight, which the first stage saves."""
    name = f"{head}.weight"
    copy = dataclasses.replace(model.specs[name], name=f"{embedding}.weight", is_copy=True)
    return dataclasses.replace(model, specs={**model.specs, name: copy})


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

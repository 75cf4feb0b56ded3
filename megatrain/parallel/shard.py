"""This rank's part of a model: the parameters it holds, where each lies in the whole, in memory and not yet filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import deepspeed
import torch
from torch import nn

from megatrain.config import RunConfig
from megatrain.distributed.fragment import Placement
from megatrain.distributed.groups import Groups
from megatrain.parallel.deepspeed_engine import Mesh
from megatrain.parallel.engine import ShardedModel
from megatrain.parallel.recompute import recompute_cores, recompute_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TiedModule(Protocol):
    """A model that can share its head's weight with its embedding once its modules have been replaced."""

    def tie_weights(self) -> None:
        """Share it, where the config says so."""


def shard_model(
    model: nn.Module,
    config: RunConfig,
    groups: Groups,
    layers: Sequence[nn.Module],
    cores: tuple[type[nn.Module], ...],
) -> ShardedModel:
    """Give a model that was built on the meta device its memory on this rank.

    ``layers``: its decoder layers; ``cores``: the types of submodules that selective recomputation recomputes.
    """
    placements = {name: Placement.whole(name, p.shape) for name, p in model.named_parameters()}
    if config.parallel.recompute == "full":
        recompute_layers(layers, config.parallel.recompute_every)
    elif config.parallel.recompute == "selective":
        recompute_cores(layers, cores)
    _allocate(model, config, groups)
    parameters = dict(model.named_parameters())
    return ShardedModel(model, placements, {name: parameters[name] for name in placements})


def _allocate(model: Any, config: RunConfig, groups: Groups) -> None:
    """Memory for every parameter; under ZeRO 3 each module's is cut among the data ranks at once."""
    model.to(DTYPES[config.train.precision])
    if config.parallel.zero_stage < 3:
        model.to_empty(device=groups.device)
        model.tie_weights()
        return
    model.tie_weights()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    for parent in model.modules():
        own = [child for child in parent.children() if next(child.parameters(recurse=False), None) is not None]
        for child in own:
            if any(p.is_meta for p in child.parameters(recurse=False)):
                child.to_empty(device=groups.device, recurse=False)
    model.tie_weights()
    deepspeed.zero.Init(
        module=model, config_dict_or_path=settings, dtype=DTYPES[config.train.precision], mpu=Mesh(groups)
    )

"""This rank's part of a model: the parameters it holds and where each lies in the whole; not yet allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from megatrain.config import RunConfig
from megatrain.distributed.fragment import ShardSpec
from megatrain.distributed.groups import Groups
from megatrain.parallel.compile import compile_layers, is_compiled
from megatrain.parallel.recompute import recompute_cores, recompute_layers
from megatrain.parallel.tensor import split_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Model: TypeAlias = Any
"""A module that tells of its layers by name: megatrain.model.decoder.DecoderStage, which this package does not know."""


class SharedWeight(NamedTuple):
    """A trained weight that several pipeline stages hold, on a rank of one of them. ``is_copy``: another, the first of
    ``group``, updates it."""

    name: str
    weight: nn.Parameter
    group: dist.ProcessGroup
    is_copy: bool

    @property
    def owner(self) -> int:
        """The rank that updates it."""
        return dist.get_process_group_ranks(self.group)[0]


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model: a chunk for each of its virtual pipeline stages, and by the names of their
    parameters, tied ones once, what each holds. ``shared``: of those that other stages hold too, the ranks which do;
    the first of them updates and saves the weight, and the others have copies."""

    chunks: Sequence[Model]
    specs: Mapping[str, ShardSpec]
    shared: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, as they are now: what gives them memory may put others in their places."""
        return {name: parameter for chunk in self.chunks for name, parameter in chunk.named_parameters()}

    def updated(self) -> dict[str, nn.Parameter]:
        """Those that this rank's optimizer updates: neither frozen nor the copy of a tied weight."""
        return {name: p for name, p in self.parameters().items() if p.requires_grad and not self.specs[name].is_copy}

    def shared_updated(self) -> list[SharedWeight]:
        """Those that other stages hold too, and that are trained; in the same order on all ranks."""
        parameters = self.parameters()
        return [
            SharedWeight(name, parameters[name], group, self.specs[name].is_copy)
            for name, group in self.shared.items()
            if parameters[name].requires_grad
        ]

    def frozen(self) -> dict[str, nn.Parameter]:
        """Those that are read and never updated: they have no gradient, no master weights, no optimizer state."""
        return {name: p for name, p in self.parameters().items() if not p.requires_grad}


def shard_model(
    chunks: Sequence[Model], config: RunConfig, groups: Groups, recomputed: tuple[type[nn.Module], ...]
) -> ShardedModel:
    """Cut models that were built on the meta device to this rank's part.

    ``recomputed``: the types that selective recomputation recomputes.
    """
    specs: dict[str, ShardSpec] = {}
    for model in chunks:
        if groups.topology.tensor > 1:
            specs |= split_model(model, config, groups)
        else:
            specs |= {name: ShardSpec.whole(name, parameter.shape) for name, parameter in model.named_parameters()}
        model.tie_weights()
        layers = [model.get_submodule(name) for name in model.decoder_names]
        if config.parallel.recompute == "selective":
            recompute_cores(layers, recomputed)
        if is_compiled(config, groups.device):
            compile_layers(layers)
        if config.parallel.recompute == "full":
            recompute_layers(layers, config.parallel.recompute_every)
    names = [name for model in chunks for name, _ in model.named_parameters()]
    return ShardedModel(chunks, {name: specs[name] for name in names})


def share_across_stages(model: ShardedModel, ranks: Mapping[str, tuple[int, ...]], groups: Groups) -> ShardedModel:
    """Let each weight that several pipeline ranks hold stand for that of the first of them. ``ranks``: by the weight's
    canonical name, which on the last stage may be that of a tied head, which stands for an embedding."""
    stage, specs, shared = groups.coordinate.pipeline, dict(model.specs), {}
    for name, holders in ranks.items():
        if stage in holders:
            own = name if name in specs else f"{model.chunks[-1].head_name}.weight"
            specs[own] = dataclasses.replace(specs[own], name=name, is_copy=stage != holders[0])
            shared[own] = groups.stages[holders]
    return dataclasses.replace(model, specs=specs, shared=shared)


def allocate(chunks: Sequence[Model], dtype: torch.dtype, device: torch.device) -> None:
    """Memory for every parameter, not yet filled."""
    for chunk in chunks:
        for module in chunk.modules():
            allocate_own(module, dtype, device)
        chunk.tie_weights()  # by now each module has a weight of its own


def allocate_own(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """The same for what is the module's own, without its submodules', and has none yet.

    As ``to_empty`` does, for which torch computes on the meta device in Python, and loads sympy.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            memory = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(memory, parameter.requires_grad))

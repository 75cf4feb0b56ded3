"""This rank's part of a model: the parameters it holds and where each lies in the whole; not yet allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
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


@dataclass(frozen=True)
class ShardedModel:
    """This rank's part of the model: a chunk for each of its virtual pipeline stages, and by the names of their
    parameters, tied ones once, what each holds."""

    chunks: Sequence[Model]
    specs: Mapping[str, ShardSpec]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, as they are now: what gives them memory may put others in their places."""
        return {name: parameter for chunk in self.chunks for name, parameter in chunk.named_parameters()}

    def updated(self) -> dict[str, nn.Parameter]:
        """Those that this rank's optimizer updates: neither frozen nor the copy of a tied weight."""
        return {name: p for name, p in self.parameters().items() if p.requires_grad and not self.specs[name].is_copy}

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


def tie_across_stages(model: ShardedModel, head: str, embedding: str) -> ShardedModel:
    """Let the head of the last stage stand for the embedding's weight, which the first stage saves."""
    name = f"{head}.weight"
    copy = dataclasses.replace(model.specs[name], name=f"{embedding}.weight", is_copy=True)
    return dataclasses.replace(model, specs={**model.specs, name: copy})


def tied_weight(model: ShardedModel, config: RunConfig, groups: Groups) -> nn.Parameter | None:
    """The weight that the first and the last pipeline stage have in common and train, on a rank of one of them."""
    if not config.model.tie_word_embeddings or groups.topology.pipeline == 1 or config.lora is not None:
        return None
    embeddings = [f"{chunk.embedding_names[0]}.weight" for chunk in model.chunks if chunk.embedding_names]
    copies = [name for name, spec in model.specs.items() if spec.is_copy]
    return next((model.parameters()[name] for name in (*embeddings, *copies)), None)


def allocate(chunks: Sequence[Model], dtype: torch.dtype, device: torch.device) -> None:
    """Memory for every parameter, not yet filled."""
    for chunk in chunks:
        for module in chunk.modules():
            allocate_own(module, dtype, device)
        chunk.tie_weights()  # by now each module has a weight of its own


def allocate_own(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """The same for what is the module's own, without its submodules'.

    As ``to_empty`` does, for which torch computes on the meta device in Python, and loads sympy.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        memory = torch.empty(parameter.shape, dtype=dtype, device=device)
        setattr(module, name, nn.Parameter(memory, parameter.requires_grad))

"""The part of a model that the ranks of a pipeline stage compute, as sizes: their tensors, without making any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from megatrain.config import ModelConfig, RunConfig
from megatrain.families.description import SHARDED_WIDTHS, Weight, Width
from megatrain.plan import rules
from megatrain.plan.stages import decoder_stages


class Parameter(NamedTuple):
    """``copies`` tensors of ``numel`` elements each on this rank, padding of the vocabulary included.

    ``num_replicas``: so many tensor ranks hold the same elements. ``is_tied``: the first stage has and saves them too.
    """

    numel: int
    is_matrix: bool
    copies: int = 1
    num_replicas: int = 1
    is_tied: bool = False


@dataclass(frozen=True)
class StageModel:
    """What each rank of pipeline stage ``stage`` computes, with its ``data`` - 1 likes. The layout must be legal."""

    config: RunConfig
    stage: int
    num_layers: int
    data: int
    num_micro_batches: int

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.stage == self.config.parallel.pipeline - 1

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.config.train.micro_batch_size * self.config.data.seq_len

    @property
    def in_flight(self) -> int:
        """Micro-batches between their forward and their backward pass, at the most (1F1B)."""
        return min(self.config.parallel.pipeline - self.stage, self.num_micro_batches)

    @cached_property
    def sizes(self) -> Mapping[Width, int]:
        """The model's widths on one of the tensor ranks, padding of the vocabulary included."""
        model, tensor = self.config.model, self.config.parallel.tensor
        mine = {width: share(size, tensor) if width in SHARDED_WIDTHS else size for width, size in model.sizes.items()}
        return {**mine, "keys": max(model.kv_heads // tensor, 1) * model.head_size}

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All tensors that it holds."""
        return tuple(self._parameters())

    @cached_property
    def num_parameters(self) -> int:
        """Elements that this rank computes with, padding of the vocabulary included."""
        return sum(p.numel * p.copies for p in self.parameters)

    @property
    def largest_parameter(self) -> int:
        """Elements of its largest tensor."""
        return max(p.numel for p in self.parameters)

    def _parameters(self) -> Iterator[Parameter]:
        model = self.config.model
        family = model.description
        if self.is_first:
            yield from self._held(weight for embedding in family.embeddings for weight in embedding.weights)
        yield from self._held(family.block.weights, self.num_layers)
        if self.is_last:
            yield from self._held(family.norm.weights)
            if not (model.tie_word_embeddings and self.is_first):
                yield from (p._replace(is_tied=model.tie_word_embeddings) for p in self._held(family.head.weights))

    def _held(self, weights: Iterable[Weight], copies: int = 1) -> Iterator[Parameter]:
        tensor = self.config.parallel.tensor
        replicas = {None: tensor, "keys": max(tensor // self.config.model.kv_heads, 1)}
        for weight in weights:
            yield Parameter(weight.numel(self.sizes), weight.is_matrix, copies, replicas.get(weight.sharded_width, 1))


def stage_models(config: RunConfig, world_size: int) -> list[StageModel]:
    """Each stage's: all that is different between ranks of a legal layout."""
    counts = _stages(config.model, config.data.seq_len, config.parallel.pipeline)
    data = rules.data_degree(config, world_size)
    num_micro_batches = rules.num_micro_batches(config, world_size)
    return [StageModel(config, stage, count, data, num_micro_batches) for stage, count in enumerate(counts)]


@lru_cache(maxsize=64)  # the search for a layout that fits asks for the same ones hundreds of times
def _stages(model: ModelConfig, seq_len: int, num_stages: int) -> tuple[int, ...]:
    return tuple(decoder_stages(model, seq_len, num_stages))


def share(size: int, ways: int) -> int:
    """The largest of so many parts of ``size``."""
    return -(-size // ways)

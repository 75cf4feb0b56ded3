"""The part of a model that each rank of a pipeline computes, as sizes: its tensors, without making any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from megatrain.config import ModelConfig, RunConfig
from megatrain.families.description import SHARDED_WIDTHS, Weight, Width, is_adapter
from megatrain.plan import rules
from megatrain.plan.pipeline_schedule import most_held
from megatrain.plan.stages import decoder_stages


class Parameter(NamedTuple):
    """``copies`` tensors of ``num_rows`` rows each on this rank, padding of the vocabulary included.

    ``decays``: the optimizer has a group of those that do, and one of the others. ``num_replicas``: so many tensor
    ranks hold the same elements. ``is_tied``: the first stage has and saves them too. ``is_trained``: not frozen.
    """

    numel: int
    num_rows: int
    decays: bool
    copies: int = 1
    num_replicas: int = 1
    is_tied: bool = False
    is_trained: bool = True


class Chunk(NamedTuple):
    """A virtual stage: ``is_first``: it has the embedding. ``is_last``: it has the final norm and the head."""

    num_layers: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class StageModel:
    """What each rank of pipeline stage ``stage`` computes, with its ``data`` - 1 likes. The layout must be legal.

    ``chunk_layers``: decoder layers of each of its virtual stages.
    """

    config: RunConfig
    stage: int
    chunk_layers: tuple[int, ...]
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
    def chunks(self) -> list[Chunk]:
        """Its virtual stages: the embedding is in the first one of the first rank, the head in the last of the last."""
        last = len(self.chunk_layers) - 1
        return [
            Chunk(count, self.is_first and index == 0, self.is_last and index == last)
            for index, count in enumerate(self.chunk_layers)
        ]

    @property
    def num_layers(self) -> int:
        """Decoder layers of all its chunks."""
        return sum(self.chunk_layers)

    @property
    def num_branches(self) -> int:
        """What its layers add to the residual stream, each with a message of tensor parallelism."""
        model = self.config.model
        *encoder, decoder = model.description.stacks
        before = sum(model.num_layers(stack) * len(stack.block.branches) for stack in encoder)
        return before + self.num_layers * len(decoder.block.branches)

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.config.train.micro_batch_size * self.config.data.seq_len

    @property
    def targets(self) -> int:
        """Of a micro-batch, scored or not."""
        config = self.config
        most = config.target_len or config.objective.most_targets(config.model, config.data.seq_len)
        return config.train.micro_batch_size * most

    @property
    def border_bytes(self) -> int:
        """Of what travels between stages, on each tensor rank: [B, T, hidden], with sequence parallelism its part."""
        parallel = self.config.parallel
        num_bytes = self.tokens * self.config.model.hidden_size * self.element_bytes
        return num_bytes // parallel.tensor if parallel.sequence else num_bytes

    def most_held(self, chunk_bytes: Sequence[float]) -> int:
        """The most between forward and backward passes; ``chunk_bytes``: of a micro-batch in each chunk."""
        parallel = self.config.parallel
        shape = parallel.pipeline, parallel.pipeline_chunks, self.num_micro_batches
        return round(most_held(*shape, self.stage, chunk_bytes))

    @cached_property
    def sizes(self) -> Mapping[Width, int]:
        """The model's widths on one of the tensor ranks, padding of the vocabulary included."""
        model, tensor = self.config.model, self.config.parallel.tensor
        mine = {width: share(size, tensor) if width in SHARDED_WIDTHS else size for width, size in model.sizes.items()}
        rank = self.config.lora.rank if self.config.lora else 0
        return {**mine, "keys": max(model.kv_heads // tensor, 1) * model.head_size, "rank": rank}

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All tensors that it holds."""
        block = (p._replace(copies=self.num_layers) for p in self.layer_parameters)
        return (*self.embedding_parameters, *self.encoder_parameters, *block, *self.head_parameters)

    @cached_property
    def embedding_parameters(self) -> tuple[Parameter, ...]:
        """Those of the embeddings, on the first rank."""
        layers = self.config.model.description.first_layers if self.is_first else ()
        return tuple(self._held(weight for layer in layers for weight in layer.weights))

    @cached_property
    def encoder_parameters(self) -> tuple[Parameter, ...]:
        """Those of an encoder's embeddings, layers and norm, and of what the layers of each stack share."""
        family = self.config.model.description
        if family.encoder is None:
            return ()
        copies = self.config.model.num_layers(family.encoder)
        layers = (p._replace(copies=copies) for p in self._held(family.encoder.block.weights))
        tables = (stack.block.attention.relative_bias for stack in family.stacks)
        own = (layer for layer in family.encoder.first_layers if layer not in family.first_layers)
        others = [layer for layer in (*own, family.encoder.norm, *tables) if layer is not None]
        return (*layers, *self._held(weight for layer in others for weight in layer.weights))

    @cached_property
    def layer_parameters(self) -> tuple[Parameter, ...]:
        """Those of one decoder layer."""
        block, lora = self.config.model.description.block, self.config.lora
        adapters = () if lora is None else block.adapter_weights(lora.adapts)
        return tuple(self._held([*block.weights, *adapters]))

    @cached_property
    def head_parameters(self) -> tuple[Parameter, ...]:
        """Those of the final norm and the head, on the last rank; an only one has a tied head's matrix already."""
        if not self.is_last:
            return ()
        family, is_tied = self.config.model.description, self.config.model.tie_word_embeddings
        before = self._held(weight for layer in family.last_layers[:-1] for weight in layer.weights)
        matrix, *bias = self._held(family.head.weights)
        head = [] if is_tied and self.is_first else [matrix._replace(is_tied=is_tied)]
        return (*before, *head, *bias)

    @cached_property
    def num_parameters(self) -> int:
        """Elements that this rank computes with, padding of the vocabulary included."""
        return num_elements(self.parameters)

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        """Those that have a gradient."""
        return tuple(p for p in self.parameters if p.is_trained)

    @cached_property
    def updated(self) -> tuple[Parameter, ...]:
        """Those that the optimizer updates here: without the copy of a weight that the first stage updates."""
        return tuple(p for p in self.trained if not p.is_tied)

    @property
    def largest_parameter(self) -> int:
        """Elements of its largest tensor."""
        return max(p.numel for p in self.parameters)

    def _held(self, weights: Iterable[Weight]) -> Iterator[Parameter]:
        tensor = self.config.parallel.tensor
        replicas = {None: tensor, "keys": max(tensor // self.config.model.kv_heads, 1)}
        for weight in weights:
            yield Parameter(
                numel=weight.numel(self.sizes),
                num_rows=weight.shape(self.sizes)[0],
                decays=self.config.optimizer.decays(weight.kind),
                num_replicas=replicas.get(weight.sharded_width, 1),
                is_trained=self.config.lora is None or is_adapter(weight.name),
            )


def stage_models(config: RunConfig, world_size: int) -> list[StageModel]:
    """Each stage's: all that is different between ranks of a legal layout."""
    num_ranks, num_chunks = config.parallel.pipeline, config.parallel.pipeline_chunks
    counts = _stages(config.model, config.data.seq_len, num_ranks * num_chunks, config.asked_share)
    data = rules.data_degree(config, world_size)
    num_micro_batches = rules.num_micro_batches(config, world_size)
    return [StageModel(config, rank, counts[rank::num_ranks], data, num_micro_batches) for rank in range(num_ranks)]


@lru_cache(maxsize=64)  # the search for a layout that fits asks for the same ones hundreds of times
def _stages(model: ModelConfig, seq_len: int, num_stages: int, asked: float) -> tuple[int, ...]:
    return tuple(decoder_stages(model, seq_len, num_stages, asked))


def num_elements(parameters: Iterable[Parameter]) -> int:
    """Of all together."""
    return sum(p.numel * p.copies for p in parameters)


def share(size: int, ways: int) -> int:
    """The largest of so many parts of ``size``."""
    return -(-size // ways)

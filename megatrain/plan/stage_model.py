"""The part of a model that each rank of a pipeline computes, as sizes: its tensors, without making any."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatrain.config import RunConfig
from megatrain.families.description import SHARDED_WIDTHS, Block, Stack, Weight, Width, is_adapter
from megatrain.plan import rules
from megatrain.plan.pipeline_schedule import most_held
from megatrain.plan.stages import StageLayers, shared_weights, stage_layers


class Parameter(NamedTuple):
    """``copies`` tensors of ``num_rows`` rows each on this rank, padding of the vocabulary included.

    ``decays``: the optimizer has a group of those that do, and one of the others. ``num_replicas``: so many tensor
    ranks hold the same elements; ``is_partial``: each of them computes a part of the gradient. ``is_shared``: other
    stages have them too; ``is_tied``: so that one of those before updates and saves them. ``is_trained``: not frozen.
    """

    numel: int
    num_rows: int
    decays: bool
    copies: int = 1
    num_replicas: int = 1
    is_partial: bool = False
    is_shared: bool = False
    is_tied: bool = False
    is_trained: bool = True


class Chunk(NamedTuple):
    """A virtual stage. ``is_first``: it has the embedding. ``is_last``: it has the final norm and the head."""

    layers: StageLayers
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers[-1])


class HeldStack(NamedTuple):
    """What a rank has of one of the model's stacks. ``begins``, ``ends``: its first, its last layer."""

    stack: Stack
    num_layers: int
    begins: bool
    ends: bool


@dataclass(frozen=True)
class StageModel:
    """What each rank of pipeline stage ``stage`` computes, with its ``data`` - 1 likes. The layout must be legal.

    ``layers``: of each of its virtual stages.
    """

    config: RunConfig
    stage: int
    layers: tuple[StageLayers, ...]
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
        last = len(self.layers) - 1
        return [
            Chunk(layers, self.is_first and index == 0, self.is_last and index == last)
            for index, layers in enumerate(self.layers)
        ]

    @property
    def num_layers(self) -> int:
        """Decoder layers of all its chunks."""
        return sum(chunk.num_layers for chunk in self.chunks)

    @cached_property
    def stacks(self) -> tuple[HeldStack, ...]:
        """What it has of each of the model's stacks, in order; of some perhaps nothing."""
        model, found = self.config.model, []
        for index, stack in enumerate(model.description.stacks):
            numbers = [number for layers in self.layers for number in layers[index]]
            found.append(HeldStack(stack, len(numbers), 0 in numbers, model.num_layers(stack) - 1 in numbers))
        return tuple(found)

    @property
    def num_branches(self) -> int:
        """What its layers add to the residual stream, each with a message of tensor parallelism."""
        return sum(held.num_layers * len(held.stack.block.branches) for held in self.stacks)

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
    def answers(self) -> int:
        """Token ids or labels that the head chooses among, on this rank."""
        return self.sizes[self.config.model.description.head.outputs[0]]

    @property
    def border_bytes(self) -> int:
        """Of what travels between stages, on each tensor rank: [B, T, hidden], with sequence parallelism its part. From
        the encoder on also what it gives, beside the decoder's stream."""
        parallel = self.config.parallel
        has_both = len(self.stacks) > 1 and self.num_layers > 0
        tokens = self.tokens + (self.targets if has_both else 0)
        num_bytes = tokens * self.config.model.hidden_size * self.element_bytes
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
        before = (*self.embedding_parameters, *self.encoder_parameters, *self.bias_parameters)
        return (*before, *block, *self.head_parameters)

    @cached_property
    def embedding_parameters(self) -> tuple[Parameter, ...]:
        """Those of the embeddings, on a rank in which a stack begins; what two stacks share once."""
        layers = dict.fromkeys(layer for held in self.stacks if held.begins for layer in held.stack.first_layers)
        return tuple(self._held(weight for layer in layers for weight in layer.weights))

    @cached_property
    def encoder_layer_parameters(self) -> tuple[Parameter, ...]:
        """Those of one encoder layer, if there is one."""
        encoder = self.config.model.description.encoder
        return () if encoder is None or not self.stacks[0].num_layers else self._of_layer(encoder.block)

    @cached_property
    def encoder_parameters(self) -> tuple[Parameter, ...]:
        """Those of an encoder's layers and norm."""
        layers = (p._replace(copies=self.stacks[0].num_layers) for p in self.encoder_layer_parameters)
        norms = [held.stack.norm for held in self.stacks[:-1] if held.ends and held.stack.norm is not None]
        return (*layers, *self._held((weight for norm in norms for weight in norm.weights), on_tokens=True))

    @cached_property
    def bias_parameters(self) -> tuple[Parameter, ...]:
        """The relative biases of the stacks whose layers it has."""
        biases = [held.stack.block.attention.relative_bias for held in self.stacks if held.num_layers]
        return tuple(self._held(weight for bias in biases if bias is not None for weight in bias.weights))

    @cached_property
    def layer_parameters(self) -> tuple[Parameter, ...]:
        """Those of one decoder layer; none where it has only an encoder's."""
        return self._of_layer(self.config.model.description.block) if self.num_layers else ()

    def _of_layer(self, block: Block) -> tuple[Parameter, ...]:
        lora = self.config.lora
        adapters = () if lora is None else block.adapter_weights(lora.adapts)
        modules = {**block.leaves, **block.factors}
        apart = {path for path, each in modules.items() if each.split is not None and each.split.kind == "shared"}
        return tuple(self._held([*block.weights, *adapters], on_tokens=True, applied_apart=apart))

    @cached_property
    def head_parameters(self) -> tuple[Parameter, ...]:
        """Those of the final norm and the head, on the last rank; one with the embedding has a tied head's already."""
        if not self.is_last:
            return ()
        family, is_tied = self.config.model.description, self.config.model.is_tied
        norm = self._held(() if family.norm is None else family.norm.weights, on_tokens=True)
        transform = self._held(() if family.head_transform is None else family.head_transform.weights)
        matrix, *bias = self._held(family.head.weights)
        head = [] if is_tied and self.embedding_parameters else [matrix._replace(is_tied=is_tied, is_shared=is_tied)]
        return (*norm, *transform, *head, *bias)

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
        """Those that the optimizer updates here: without copies of weights that an earlier stage updates."""
        return tuple(p for p in self.trained if not p.is_tied)

    @property
    def largest_parameter(self) -> int:
        """Elements of its largest tensor."""
        return max(p.numel for p in self.parameters)

    def _held(
        self, weights: Iterable[Weight], *, on_tokens: bool = False, applied_apart: Container[str] = ()
    ) -> Iterator[Parameter]:
        """``on_tokens``: with sequence parallelism each tensor rank applies them to tokens of its own.
        ``applied_apart``: the modules whose weights it applies to heads or columns of its own."""
        tensor, shared = self.config.parallel.tensor, shared_weights(self.config)
        replicas = {None: tensor, "keys": max(tensor // self.config.model.kv_heads, 1)}
        on_own_tokens = on_tokens and self.config.parallel.sequence
        for weight in weights:
            num_replicas = replicas.get(weight.sharded_width, 1)
            sees_part = (
                on_own_tokens or weight.sharded_width is not None or weight.name.rpartition(".")[0] in applied_apart
            )
            yield Parameter(
                numel=weight.numel(self.sizes),
                num_rows=weight.shape(self.sizes)[0],
                decays=self.config.optimizer.decays(weight.kind),
                num_replicas=num_replicas,
                is_partial=num_replicas > 1 and sees_part,
                is_shared=weight.name in shared,
                is_tied=weight.name in shared and shared[weight.name][0] != self.stage,
                is_trained=self.config.lora is None or is_adapter(weight.name),
            )


def stage_models(config: RunConfig, world_size: int) -> list[StageModel]:
    """Each stage's: all that is different between ranks of a legal layout."""
    num_ranks, layers = config.parallel.pipeline, stage_layers(config)
    data = rules.data_degree(config, world_size)
    num_micro_batches = rules.num_micro_batches(config, world_size)
    parts = [tuple(layers[rank::num_ranks]) for rank in range(num_ranks)]
    return [StageModel(config, rank, part, data, num_micro_batches) for rank, part in enumerate(parts)]


def num_elements(parameters: Iterable[Parameter]) -> int:
    """Of all together."""
    return sum(p.numel * p.copies for p in parameters)


def share(size: int, ways: int) -> int:
    """The largest of so many parts of ``size``."""
    return -(-size // ways)

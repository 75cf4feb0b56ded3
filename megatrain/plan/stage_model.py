"""The part of a model that a rank computes, as sizes: which tensors it holds, without making any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from megatrain.config import ModelConfig, RunConfig
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
class Widths:
    """How wide the model is on one of ``tensor`` ranks, in elements."""

    model: ModelConfig
    tensor: int

    @property
    def queries(self) -> int:
        """All query heads of the rank."""
        return self.model.num_attention_heads // self.tensor * self.model.head_size

    @property
    def keys(self) -> int:
        """All key heads of the rank; its value heads are as wide."""
        return max(self.model.kv_heads // self.tensor, 1) * self.model.head_size

    @property
    def key_replicas(self) -> int:
        """Tensor ranks that hold the same key-value head."""
        return max(self.tensor // self.model.kv_heads, 1)

    @property
    def ffn(self) -> int:
        """Inside the MLP."""
        return self.model.ffn_size // self.tensor

    @property
    def vocab(self) -> int:
        """Token ids, padding included."""
        return share(self.model.vocab_size or 0, self.tensor)


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
    def widths(self) -> Widths:
        """Of this rank's matrices."""
        return Widths(self.config.model, self.config.parallel.tensor)

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
        model, tensor = self.config.model, self.config.parallel.tensor
        table = self.widths.vocab * model.hidden_size
        if self.is_first:
            yield Parameter(table, True)
            if model.family == "gpt2":
                yield Parameter(model.max_position_embeddings * model.hidden_size, True, num_replicas=tensor)
        for parameter in _layer(self.widths):
            yield parameter._replace(copies=parameter.copies * self.num_layers)
        if self.is_last:
            yield Parameter(model.hidden_size, False, 2 if model.family == "gpt2" else 1, tensor)
            if not (model.tie_word_embeddings and self.is_first):
                yield Parameter(table, True, is_tied=model.tie_word_embeddings)


def parts(config: RunConfig, world_size: int) -> list[StageModel]:
    """Each stage's part: all that is different between ranks of a legal layout."""
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


def _layer(widths: Widths) -> list[Parameter]:
    """The tensors of a decoder layer."""
    model, tensor = widths.model, widths.tensor
    hidden, queries, keys, ffn = model.hidden_size, widths.queries, widths.keys, widths.ffn
    if model.family == "gpt2":
        return [
            Parameter(hidden, False, 6, tensor),  # two norms' weights and biases, the biases of both outputs
            Parameter(3 * queries * hidden, True),
            Parameter(3 * queries, False),
            Parameter(queries * hidden, True),
            Parameter(ffn * hidden, True, 2),
            Parameter(ffn, False),
        ]
    head_norms = [Parameter(model.head_size, False, 2, tensor)] if model.family == "qwen3" else []
    return [
        Parameter(hidden, False, 2, tensor),
        *head_norms,
        Parameter(queries * hidden, True, 2),
        Parameter(keys * hidden, True, 2, widths.key_replicas),
        Parameter(ffn * hidden, True, 3),
    ]

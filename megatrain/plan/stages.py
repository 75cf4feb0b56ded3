"""Which layers each pipeline stage gets: consecutive ones, so that the slowest stage is as fast as it can be; and which
weights several stages need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TypeAlias

from megatrain.config import ModelConfig, RunConfig
from megatrain.plan.flops import flops_of_head, flops_of_pair_layers, flops_per_token

StageLayers: TypeAlias = tuple[range, ...]
"""Of each of the model's stacks, the numbers of the layers that a virtual stage has."""


def stage_layers(config: RunConfig) -> Sequence[StageLayers]:
    """Those of each virtual stage, in order: the encoder's layers, if there is one, then the decoder's. A stage in
    which a stack begins has its embedding too, one in which it ends its norm, and the last one the head."""
    num_stages = config.parallel.pipeline * config.parallel.pipeline_chunks
    return _stage_layers(config.model, config.data.seq_len, config.target_len, num_stages, config.predicted_share)


@lru_cache(maxsize=64)  # the search for a layout that fits asks for the same ones hundreds of times
def _stage_layers(
    model: ModelConfig, seq_len: int, target_len: int | None, num_stages: int, predicted: float
) -> Sequence[StageLayers]:
    """Costs are the FLOPs of a sample: the head's are those of several layers where the vocabulary is large.
    ``predicted``: the share of the tokens that the head sees."""
    counts = [model.num_layers(stack) for stack in model.description.stacks]
    costs, head = [1.0] * len(counts), 0.0
    if model.vocab_size and target_len is not None:
        costs = [*flops_of_pair_layers(model, seq_len, target_len)]
        head = flops_of_head(model, None, 1.0) * target_len
    elif model.vocab_size:
        head = flops_of_head(model, None, predicted)
        costs = [(flops_per_token(model, seq_len, None, predicted) - head) / counts[0]]
    layers = [cost for cost, count in zip(costs, counts, strict=True) for _ in range(count)]
    places = [(stack, number) for stack, count in enumerate(counts) for number in range(count)]
    found, first = [], 0
    for size in balance(layers, head, num_stages):
        mine = places[first : first + size]
        numbers = [[number for of, number in mine if of == stack] for stack in range(len(counts))]
        found.append(tuple(range(each[0], each[-1] + 1) if each else range(0) for each in numbers))
        first += size
    return found


def shared_weights(config: RunConfig) -> Mapping[str, tuple[int, ...]]:
    """Each weight that several pipeline ranks hold, by its canonical name, and which; the first of them saves it.

    What a stack's layers share each rank with layers of it has: a relative bias. What two stacks share has each rank in
    which one of them begins: the embedding; a tied head is one more of it.
    """
    family, num_ranks = config.model.description, config.parallel.pipeline
    stages = stage_layers(config)
    held: dict[str, set[int]] = {}
    for stage, layers in enumerate(stages):
        for stack, numbers in zip(family.stacks, layers, strict=True):
            begin = stack.first_layers if 0 in numbers else ()
            bias = stack.block.attention.relative_bias if numbers else None
            for layer in (*begin, *([bias] if bias else [])):
                for weight in layer.weights:
                    held.setdefault(weight.name, set()).add(stage % num_ranks)
    if config.model.is_tied:
        held[f"{family.embeddings[0].name}.weight"].add(num_ranks - 1)
    return {name: tuple(sorted(ranks)) for name, ranks in held.items() if len(ranks) > 1}


def balance(layers: Sequence[float], head: float, num_stages: int) -> list[int]:
    """Split ``layers`` (their costs) into ``num_stages`` runs of at least one, the last of which also bears ``head``.

    The largest cost of a stage is as small as possible; among equals, earlier stages get more layers.
    """
    if not 1 <= num_stages <= len(layers):
        raise ValueError(f"{len(layers)} layers cannot be spread over {num_stages} stages")
    sums = [0.0]
    for cost in layers:
        sums.append(sums[-1] + cost)

    @cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        if stages == 1:
            return sums[-1] - sums[first] + head, (len(layers) - first,)
        options = []
        for count in range(1, len(layers) - first - stages + 2):
            rest, counts = best(first + count, stages - 1)
            options.append((max(sums[first + count] - sums[first], rest), -count, (count, *counts)))
        largest, _, counts = min(options)
        return largest, counts

    return list(best(0, num_stages)[1])

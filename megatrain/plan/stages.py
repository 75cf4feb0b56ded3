"""Which layers each pipeline stage gets: consecutive ones, so that the slowest stage is as fast as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatrain.config import ModelConfig
from megatrain.plan.flops import flops_of_head, flops_per_token


def decoder_stages(model: ModelConfig, seq_len: int, num_stages: int, asked: float = 1.0) -> list[int]:
    """Decoder layers of each stage, in order. The first has the embedding too, the last the final norm and the head.

    Costs are the FLOPs of a token: the head's are those of several layers where the vocabulary is large. ``asked``: the
    share of the tokens that the head sees.
    """
    num_layers = model.num_layers(model.description.decoder)
    if not model.vocab_size:
        return balance([1.0] * num_layers, 0, num_stages)
    head = flops_of_head(model, None, asked)
    layer = (flops_per_token(model, seq_len, None, asked) - head) / num_layers
    return balance([layer] * num_layers, head, num_stages)


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

"""A search for the nearest legal layout: the fewest keys changed, then the smallest changes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count

from megatrain.config import RunConfig
from megatrain.config.arithmetic import divisors, multiples_around
from megatrain.config.batch_size import BatchSize, sizes_of, with_sizes
from megatrain.config.problem import as_yaml

Value = int | str | bool | BatchSize
Change = tuple[str, Value]
"""A key with its section, and its new value."""

MAX_CHANGES = 4
MAX_CANDIDATES = 8
LESS_PREFERRED = 100.0  # more than any distance
ONE_CHANGE = 10_000.0  # more than the preferences and distances of all changes
CHOICES = {
    "parallel.engine": ("deepspeed", "fsdp2"),
    "parallel.offload": ("none", "optimizer", "all"),
    "train.compile": ("auto", "off"),
}


def with_changes(config: RunConfig, *changes: Change) -> RunConfig:
    """The config with other values for these keys, legal or not."""
    for key, value in changes:
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def as_overrides(changes: tuple[Change, ...]) -> str:
    return " ".join(f"{key}={as_yaml(value)}" for key, value in changes)


def value_of(config: RunConfig, key: str) -> Value:
    section, name = key.split(".")
    value: Value = getattr(getattr(config, section), name)
    return value


def find_nearest(
    config: RunConfig, world_size: int, keys_to_change: Callable[[RunConfig], tuple[str, ...] | None]
) -> tuple[Change, ...] | None:
    """The changes of least cost to a legal layout; None where MAX_CHANGES of those tried do not suffice.

    ``keys_to_change`` names the keys that may help, the best first, or gives None where the layout is legal.
    """
    order = count()  # of equal costs, what was found first
    queue: list[tuple[float, int, tuple[Change, ...]]] = [(0.0, next(order), ())]
    while queue:
        cost, _, changes = heapq.heappop(queue)
        changed = with_changes(config, *changes)
        keys = keys_to_change(changed)
        if keys is None:
            return changes
        if len(changes) == MAX_CHANGES:
            continue
        for preference, key in enumerate(keys):
            if key in dict(changes):
                continue
            for value in candidates(changed, world_size, key):
                further = ONE_CHANGE + LESS_PREFERRED * preference + _distance(key, value_of(changed, key), value)
                heapq.heappush(queue, (cost + further, next(order), (*changes, (key, value))))
    return None


def candidates(config: RunConfig, world_size: int, key: str) -> list[Value]:
    """Other values for the key that may be legal, nearest first."""
    model, parallel, train = config.model, config.parallel, config.train
    values: list[Value]
    if key == "parallel.tensor":
        values = [*divisors(model.num_attention_heads)]
    elif key == "parallel.pipeline":
        num_layers = sum(model.num_layers(stack) for stack in model.description.stacks)
        values = [stages for stages in divisors(world_size) if stages <= num_layers]
    elif key == "parallel.pipeline_chunks":
        values = [*range(1, model.num_hidden_layers // parallel.pipeline + 1)]
    elif key == "parallel.zero_stage":
        values = [0, 1, 2, 3]
    elif key == "parallel.sequence":
        values = [True, False]
    elif key in CHOICES:
        values = [*CHOICES[key]]
    elif key == "train.micro_batch_size":
        values = [*divisors(math.gcd(*sizes_of(train.global_batch_size)))]
    elif key == "data.seq_len":
        longest = model.max_position_embeddings
        values = [length for length in multiples_around(config.data.seq_len, parallel.tensor) if length <= longest]
    else:
        ranks = parallel.tensor * parallel.pipeline
        data = 1 if world_size % ranks else world_size // ranks
        unit = train.micro_batch_size * data
        below = with_sizes(train.global_batch_size, lambda size: multiples_around(size, unit)[0])
        above = with_sizes(train.global_batch_size, lambda size: multiples_around(size, unit)[-1])
        values = [*dict.fromkeys((below, above))]
    now = value_of(config, key)
    return sorted((v for v in values if v != now), key=lambda value: _distance(key, now, value))[:MAX_CANDIDATES]


def _distance(key: str, now: Value, value: Value) -> float:
    """Doublings of a size, steps of a stage, 1 for a switch."""
    if isinstance(value, str) or isinstance(now, str):
        return float(abs(CHOICES[key].index(str(value)) - CHOICES[key].index(str(now))))
    if isinstance(value, tuple) or isinstance(now, tuple):
        return max(abs(math.log2(new / old)) for new, old in zip(sizes_of(value), sizes_of(now), strict=True))
    if key in ("parallel.zero_stage", "parallel.sequence"):
        return float(abs(int(value) - int(now)))
    return abs(math.log2(value / now))

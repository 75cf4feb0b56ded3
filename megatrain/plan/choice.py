"""The engine, and the chunks of a pipeline rank, with which a run is fastest of those with which it fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from megatrain.config import RunConfig
from megatrain.plan import rules
from megatrain.plan.cluster import Cluster
from megatrain.plan.fitting import peak_bytes
from megatrain.plan.nearest import CHOICES, Change, Value, with_changes
from megatrain.plan.stage_model import stage_models
from megatrain.plan.time import step_time

WORTHWHILE = 0.99
"""Of a step's seconds: the estimate is not so exact that a smaller gain would be one."""
ROOM = 0.95
"""Of a device's memory: the rest is for what a plan does not count (CUDA, NCCL, memory in pieces)."""
_CHUNKS = (1, 2, 4, 8)


class Choice(NamedTuple):
    """``changes``: to the config, none where it is the fastest itself. ``engine``, ``chunks``: with them."""

    engine: str
    chunks: int
    step_seconds: float
    changes: tuple[Change, ...]


def fastest(config: RunConfig, cluster: Cluster) -> Choice:
    """As `plan` estimates it, with the layout as it is otherwise: of those that are as fast as any, the one with the
    fewest changes. The config's own counts, though it may not fit."""
    choices = list(_choices(config, cluster))
    enough = min(choice.step_seconds for choice in choices) / WORTHWHILE
    return min(
        (choice for choice in choices if choice.step_seconds <= enough),
        key=lambda choice: (len(choice.changes), choice.step_seconds),
    )


def _choices(config: RunConfig, cluster: Cluster) -> Iterator[Choice]:
    own = config.parallel.engine, config.parallel.pipeline_chunks
    for engine, chunks in itertools.product(CHOICES["parallel.engine"], sorted({*_CHUNKS, own[1]})):
        given: dict[str, Value] = {"parallel.engine": engine, "parallel.pipeline_chunks": chunks}
        changes = tuple(change for change, now in zip(given.items(), own, strict=True) if change[1] != now)
        other = with_changes(config, *changes)
        if not changes or (rules.is_legal(other, cluster.world_size) and _fits(other, cluster)):
            yield Choice(engine, chunks, _seconds(other, cluster), changes)


def _seconds(config: RunConfig, cluster: Cluster) -> float:
    return step_time(stage_models(config, cluster.world_size), cluster).step


def _fits(config: RunConfig, cluster: Cluster) -> bool:
    return peak_bytes(config, cluster.world_size) <= ROOM * cluster.device.memory_bytes

"""The engine, and the chunks of a pipeline rank, with which a run is fastest of those with which it fits."""

from __future__ import annotations

import itertools
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
_CHUNKS = (1, 2, 4, 8)


class Choice(NamedTuple):
    """``changes``: to the config, none where it is the fastest itself. ``engine``, ``chunks``: with them."""

    engine: str
    chunks: int
    step_seconds: float
    changes: tuple[Change, ...]


def fastest(config: RunConfig, cluster: Cluster) -> Choice:
    """As `plan` estimates it, with the layout as it is otherwise. The config's own where nothing else is faster."""
    own = config.parallel.engine, config.parallel.pipeline_chunks
    best = Choice(*own, _seconds(config, cluster), ())
    for engine, chunks in itertools.product(CHOICES["parallel.engine"], sorted({*_CHUNKS, own[1]})):
        given: dict[str, Value] = {"parallel.engine": engine, "parallel.pipeline_chunks": chunks}
        changes = tuple(change for change, now in zip(given.items(), own, strict=True) if change[1] != now)
        other = with_changes(config, *changes)
        if not rules.is_legal(other, cluster.world_size):
            continue
        seconds = _seconds(other, cluster)
        if seconds < WORTHWHILE * best.step_seconds and _fits(other, cluster):
            best = Choice(engine, chunks, seconds, changes)
    return best


def _seconds(config: RunConfig, cluster: Cluster) -> float:
    return step_time(stage_models(config, cluster.world_size), cluster).step


def _fits(config: RunConfig, cluster: Cluster) -> bool:
    return peak_bytes(config, cluster.world_size) <= cluster.device.memory_bytes

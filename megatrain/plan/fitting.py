"""What to change in a config that does not fit its devices: the fewest keys, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from megatrain.config import RunConfig
from megatrain.plan import rules
from megatrain.plan.memory import rank_memory
from megatrain.plan.nearest import Change, as_overrides, with_changes
from megatrain.plan.stage_model import stage_models
from megatrain.units import format_bytes

MAX_CHANGES = 3
WORTHWHILE = 0.9
"""Of the peak: what saves less would soon run out again."""


def peak_bytes(config: RunConfig, world_size: int) -> int:
    """The most memory that any rank's device needs at any time."""
    return max(rank_memory(part).peak_bytes for part in stage_models(config, world_size))


def changes_that_fit(config: RunConfig, world_size: int, gpus_per_node: int, memory_bytes: float) -> str | None:
    """Overrides with which it fits ``memory_bytes``; None where MAX_CHANGES of those tried do not suffice."""
    options = list(_options(config, gpus_per_node))
    for count in range(1, MAX_CHANGES + 1):
        for changes in combinations(options, count):
            if len({key for key, _ in changes}) == count:
                changed = with_changes(config, *changes)
                if rules.is_legal(changed, world_size) and peak_bytes(changed, world_size) <= memory_bytes:
                    return as_overrides(changes)
    return None


def out_of_memory_advice(config: RunConfig, world_size: int, gpus_per_node: int, memory_bytes: float) -> str:
    """What to do about a run that is out of memory, of which each rank has ``memory_bytes``, whatever was planned."""
    peak = peak_bytes(config, world_size)
    changes = changes_that_fit(config, world_size, gpus_per_node, min(memory_bytes, WORTHWHILE * peak))
    nearest = f"it takes less with {changes}" if changes else "no change of up to three keys that was tried would do"
    return (
        f"`megatrain plan` counts {format_bytes(peak)} of the {format_bytes(memory_bytes)} that a rank has; {nearest}. "
        "Where that should have fitted, another process holds memory there, or it is in pieces: "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."
    )


def _options(config: RunConfig, gpus_per_node: int) -> Iterator[Change]:
    """Single changes that save memory, in the order in which docs/parallelism.md advises them."""
    parallel, micro_batch = config.parallel, config.train.micro_batch_size
    if parallel.zero_stage == 0:
        yield "parallel.zero_stage", 1
    for kind in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[parallel.recompute]:
        yield "parallel.recompute", kind
    yield from (("train.micro_batch_size", size) for size in _halves(micro_batch))
    yield from (("parallel.tensor", size) for size in _doubles(parallel.tensor, gpus_per_node))
    yield from (("parallel.zero_stage", stage) for stage in range(max(parallel.zero_stage + 1, 2), 4))
    yield from (("parallel.pipeline", size) for size in _doubles(parallel.pipeline, config.model.num_hidden_layers))
    if parallel.engine != "fsdp2":
        yield "parallel.engine", "fsdp2"
    yield from (("parallel.pipeline_chunks", count) for count in _halves(parallel.pipeline_chunks))
    if parallel.offload == "none":
        yield "parallel.offload", "optimizer"


def _halves(size: int) -> Iterator[int]:
    while size > 1 and size % 2 == 0:
        size //= 2
        yield size


def _doubles(size: int, largest: int) -> Iterator[int]:
    while size * 2 <= largest:
        size *= 2
        yield size

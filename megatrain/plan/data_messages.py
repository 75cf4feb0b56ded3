"""What data ranks send in a step under each engine, in bytes, and what of it their passes hide.

Bytes were measured by benchmarks/layouts.py (docs/parallelism.md). DeepSpeed sends between passes, while nothing
computes (`overlap_comm` is off unless it is asked for). FSDP2 gathers a layer's weights while the one before computes,
and reduces a layer's gradients while the next one is in its backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

from megatrain.plan.cluster import Cluster
from megatrain.plan.deepspeed_memory import bucket_setting, uses_bf16_optimizer
from megatrain.plan.fsdp2_memory import message_groups
from megatrain.plan.stage_model import StageModel, num_elements

_FORWARD, _BACKWARD = 1 / 3, 2 / 3  # of a micro-batch's arithmetic


class DataSeconds(NamedTuple):
    """``waited``: nothing computes meanwhile. ``hidden``: the passes go on."""

    waited: float
    hidden: float


class _Messages(NamedTuple):
    """Bytes of a pass, before the factor (d - 1) / d of a ring; ``edge``: of its first or last message, which no
    arithmetic hides; ``times``: passes of a step that send so."""

    num_bytes: float
    edge: float
    times: int
    share: float
    """Of a micro-batch's arithmetic that goes on meanwhile; 0: none."""


def data_seconds(part: StageModel, compute: float, cluster: Cluster) -> DataSeconds:
    """``compute``: seconds of a micro-batch's arithmetic."""
    ring = (part.data - 1) / part.data / cluster.bandwidth(part.data, part.config.parallel.tensor)
    whole = waited = 0.0
    for each in _fsdp2(part) if part.config.parallel.engine == "fsdp2" else _deepspeed(part):
        whole += each.times * each.num_bytes * ring
        left = each.num_bytes * ring - each.share * compute
        waited += each.times * (max(left, each.edge * ring) if each.share else each.num_bytes * ring)
    return DataSeconds(waited, whole - waited)


def _deepspeed(part: StageModel) -> list[_Messages]:
    """Gradients in fp32, weights in their own type."""
    stage, count = part.config.parallel.zero_stage, part.num_micro_batches
    gradients, weights = 4 * num_elements(part.trained), part.element_bytes * num_elements(part.trained)
    if stage == 0:
        return [_unhidden(2 * gradients)]
    if stage == 1:  # DeepSpeed's BF16_Optimizer all-reduces gradients
        return [_unhidden((2 if uses_bf16_optimizer(part.config) else 1) * gradients + weights)]
    if stage == 2:
        return [_unhidden(gradients, count), _unhidden(weights)]
    weights = part.element_bytes * part.num_parameters  # frozen ones too
    # Weights that may stay whole until the backward pass are gathered once.
    stay = part.num_parameters <= bucket_setting(part, "stage3_max_live_parameters")
    return [_unhidden(gradients + (1 if stay else 2) * weights, count)]


def _unhidden(num_bytes: float, times: int = 1) -> _Messages:
    return _Messages(num_bytes, 0.0, times, 0.0)


def _fsdp2(part: StageModel) -> list[_Messages]:
    """ZeRO 0 and 1: whole sums are reduced in the last backward pass; weights are gathered in the first forward pass.

    ZeRO 2 reduces in each backward pass. ZeRO 3 gathers in each pass as well, but once the group that stays whole.
    """
    stage, count, bytes_ = part.config.parallel.zero_stage, part.num_micro_batches, part.element_bytes
    size, trained = part.num_parameters, num_elements(part.trained)
    layer, *others = (sum(p.numel for p in group) for group in message_groups(part))
    edge = others[0] if part.is_first else layer
    gathered = _Messages(bytes_ * size, bytes_ * edge, count if stage == 3 else 1, _FORWARD)
    if stage < 3:
        return [gathered, _Messages(4 * trained, 4 * min(edge, trained), count if stage == 2 else 1, _BACKWARD)]
    again = size - (others[-1] if part.is_last else 0)
    return [gathered, _Messages(4 * trained + bytes_ * again, 4 * min(edge, trained), count, _BACKWARD)]

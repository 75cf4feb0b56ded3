"""What each distinct kind of rank holds in memory, in bytes: what stays, what a pass keeps, what comes and goes.

Weights, gradients and optimizer are what DeepSpeed really allocates here, to the byte but for the cases named at
`_gradients`; tests/unit/plan/test_rank_memory.py holds them against its engines. They differ from "ZeRO" (Rajbhandari
et al. 2020, arXiv:1910.02054) in that gradients are summed in fp32, and where docs/parallelism.md says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.config import RunConfig
from megatrain.plan.activations import activations, working_set
from megatrain.plan.stage_model import StageModel, share

_SMALLEST_BUCKET = 1 << 20
_LARGEST_BUCKET = 1 << 29
_ALL_REDUCE_ELEMENTS = 500_000_000  # DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: what it copies into one message
_STEP_BYTES = 4  # torch's AdamW counts the steps of each of its tensors in one of fp32
_STATE_BYTES = 12  # master weight, running mean, running square


@dataclass(frozen=True)
class RankMemory:
    """The memory of one kind of rank, in bytes.

    ``rank``: the first of the ``num_ranks`` of pipeline stage ``stage``. ``parameters``: elements it computes with.
    ``passes`` and ``update``: buffers of the device that come and go, those of forward and backward passes, and those
    of the update, when activations are gone. ``cpu``: in the memory of its node.
    """

    rank: int
    num_ranks: int
    stage: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    passes: Mapping[str, int]
    update: Mapping[str, int]
    cpu: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time, with the buffers."""
        resident = self.total_bytes - self.activations_bytes
        return resident + max(self.activations_bytes + sum(self.passes.values()), sum(self.update.values()))

    def to_json(self) -> dict[str, Any]:
        shown = {key: value for key, value in vars(self).items() if key not in ("passes", "update", "cpu")}
        return {
            **shown,
            "total_bytes": self.total_bytes,
            "peak_bytes": self.peak_bytes,
            "buffers_bytes": {"passes": dict(self.passes), "update": dict(self.update)},
            "cpu_bytes": dict(self.cpu),
        }


def rank_memory(part: StageModel) -> RankMemory:
    offload, stage = part.config.parallel.offload, part.config.parallel.zero_stage
    weights, gradients, optimizer = _weights(part), _gradients(part), _optimizer(part)
    cpu = {"checkpoint copy": _STATE_BYTES * _owned(part)}
    if offload != "none":
        _, mine = _flat(part)
        cpu["optimizer"], optimizer = optimizer, 0
        cpu["gradients"] = (8 if stage == 3 else 4) * mine  # ZeRO 3: the sums, and what the optimizer is given
        if stage == 3:
            gradients = 0
        else:
            cpu["weights"] = part.element_bytes * mine  # on their way from the masters to the device
    if offload == "all":
        cpu["weights"], weights = weights, 0
    num_ranks = part.data * part.config.parallel.tensor
    return RankMemory(
        rank=part.stage * num_ranks,
        num_ranks=num_ranks,
        stage=part.stage,
        parameters=part.num_parameters,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations(part),
        passes=_present({**working_set(part), **_pass_buffers(part)}),
        update=_present(_update_buffers(part)),
        cpu=cpu,
    )


def bucket_elements(num_parameters: int) -> int:
    """Elements of DeepSpeed's buckets for a rank that computes with so many: all at once, within limits."""
    return min(max(num_parameters, _SMALLEST_BUCKET), _LARGEST_BUCKET)


def uses_bf16_optimizer(config: RunConfig) -> bool:
    """Whether DeepSpeed's BF16_Optimizer is at work: it keeps whole fp32 sums of gradients, and no others."""
    parallel = config.parallel
    return parallel.zero_stage < 2 and config.train.precision == "bf16" and parallel.offload == "none"


def _flat(part: StageModel) -> tuple[int, int]:
    """Elements of the buffers that DeepSpeed lays the parameters into, matrices and vectors apart; a data rank's share.

    ZeRO 3 cuts each parameter by itself; the others the buffers, whose length is a multiple of 2 for each rank.
    """
    stage, cut = part.config.parallel.zero_stage, part.data if part.config.parallel.zero_stage else 1
    if stage == 3:
        return part.num_parameters, sum(share(p.numel, cut) * p.copies for p in part.parameters)
    if stage == 0 and part.config.train.precision == "fp32":  # torch's own optimizer, on the parameters themselves
        return part.num_parameters, part.num_parameters
    groups = [sum(p.numel * p.copies for p in part.parameters if p.is_matrix is kind) for kind in (True, False)]
    whole = sum(share(size, 2 * cut) * 2 * cut for size in groups)
    return whole, whole // cut


def _weights(part: StageModel) -> int:
    whole, mine = _flat(part)
    return part.element_bytes * (mine if part.config.parallel.zero_stage == 3 else whole)


def _optimizer(part: StageModel) -> int:
    if part.config.parallel.zero_stage == 0 and part.config.train.precision == "fp32":  # the weights are the masters
        return 8 * part.num_parameters + _STEP_BYTES * sum(p.copies for p in part.parameters)
    return _STATE_BYTES * _flat(part)[1] + 2 * _STEP_BYTES


def _gradients(part: StageModel) -> int:
    """What is there between two passes of a step.

    In fp32, ZeRO 2 keeps whole the gradients of parameters of which a share has a part: up to two parameters more. ZeRO
    3 steps through sub-groups of a bucket's size: a few bytes more for each.
    """
    whole, mine = _flat(part)
    if uses_bf16_optimizer(part.config):
        return 4 * whole
    return 4 * (mine if part.config.parallel.zero_stage >= 2 else part.num_parameters)


def _owned(part: StageModel) -> int:
    """The most elements that a rank of this kind saves: what ranks hold alike is shared out among them."""
    stage, data = part.config.parallel.zero_stage, part.data
    own = [p for p in part.parameters if not p.is_tied]
    if stage == 3:
        return sum(share(share(p.numel, data), p.num_replicas) * p.copies for p in own)
    if stage == 0:
        return sum(share(p.numel, p.num_replicas * data) * p.copies for p in own)
    return min(_flat(part)[1], sum(share(p.numel, p.num_replicas) * p.copies for p in own))


def _pass_buffers(part: StageModel) -> dict[str, int]:
    """What DeepSpeed holds while passes are made, beside the gradients."""
    stage, bytes_, size = part.config.parallel.zero_stage, part.element_bytes, part.num_parameters
    bucket = bucket_setting(part, "reduce_bucket_size")
    is_half = bytes_ < 4
    buffers = {"a weight's gradient": bytes_ * part.largest_parameter}
    if stage in (1, 2) and part.config.parallel.offload != "none":
        buffers["a gradient on its way"] = bytes_ * part.largest_parameter
    if stage == 2:  # gradients in their own type, and in fp32 as they travel
        buffers["bucket of gradients"] = (bytes_ + 4 * is_half) * bucket
    if stage == 3:
        live = max(min(size, bucket_setting(part, "stage3_max_live_parameters")), part.largest_parameter)
        buffers |= {"bucket of gradients": 4 * bucket, "gathered weights": bytes_ * live}
    if part.config.parallel.pipeline > 1:
        shared = part.config.parallel.tensor
        border = part.tokens * part.config.model.hidden_size * bytes_ // shared
        buffers["sent and received"] = border * (max(2, part.in_flight) + 2)
    return buffers


def _update_buffers(part: StageModel) -> dict[str, int]:
    """What DeepSpeed holds from the last backward pass to the next forward pass, beside the state."""
    stage, data, size = part.config.parallel.zero_stage, part.data, part.num_parameters
    whole, mine = _flat(part)
    matrices = sum(p.numel * p.copies for p in part.parameters if p.is_matrix)
    if uses_bf16_optimizer(part.config):  # two buffers, copied into one message if they are not too large
        is_copied = stage == 1 and data > 1 and matrices <= _ALL_REDUCE_ELEMENTS
        return {"gradients in a message": 4 * whole if is_copied else 0}
    if stage == 0 and part.element_bytes == 4:
        largest = _ALL_REDUCE_ELEMENTS + part.largest_parameter
        return {"gradients in a message": 4 * min(size, largest) if data > 1 else 0}
    if stage == 0:
        return {"gradients of the update": 4 * mine}
    if stage == 1 and part.element_bytes < 4:
        return {"bucket of gradients": 4 * bucket_setting(part, "reduce_bucket_size") + 4 * mine}
    return {"gradients of the update": 4 * min(mine, bucket_setting(part, "sub_group_size"))} if stage == 3 else {}


def bucket_setting(part: StageModel, key: str) -> int:
    """A bucket of DeepSpeed's: what the user put under ``deepspeed``, or what megatrain sets."""
    given = part.config.deepspeed.get("zero_optimization", {})
    value = given.get(key) if isinstance(given, Mapping) else None
    return int(value) if isinstance(value, (int, float)) else bucket_elements(part.num_parameters)


def _present(buffers: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in buffers.items() if size}

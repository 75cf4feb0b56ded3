"""What DeepSpeed holds on a rank, in bytes, as `megatrain.parallel.deepspeed` uses it.

State is what it really allocates, to the byte but for the cases named at `_gradients`. It differs from "ZeRO"
(Rajbhandari et al. 2020, arXiv:1910.02054) in that gradients are summed in fp32, and where docs/parallelism.md says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatrain.config import RunConfig
from megatrain.plan.engine_memory import STEP_BYTES, EngineMemory, saved_elements, weight_state_bytes
from megatrain.plan.stage_model import Parameter, StageModel, num_elements, share

_SMALLEST_BUCKET = 1 << 20
_LARGEST_BUCKET = 1 << 29
_ALL_REDUCE_ELEMENTS = 500_000_000  # DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: what it copies into one message


def deepspeed_memory(part: StageModel) -> EngineMemory:
    """What is there under ``parallel.engine: deepspeed``."""
    offload, stage = part.config.parallel.offload, part.config.parallel.zero_stage
    weights, gradients, optimizer = _weights(part), _gradients(part), _optimizer(part)
    cpu = {}
    if offload != "none":
        _, mine = _flat(part)
        cpu["optimizer"], optimizer = optimizer, 0
        cpu["gradients"] = (8 if stage == 3 else 4) * mine  # ZeRO 3: the sums, and what the optimizer is given
        if stage == 3:
            gradients = 4 * partial_elements(part)
        else:
            cpu["weights"] = part.element_bytes * mine  # on their way from the masters to the device
    if offload == "all":
        cpu["weights"], weights = weights, 0
    return EngineMemory(weights, gradients, optimizer, _owned(part), _pass_buffers(part), _update_buffers(part), cpu)


def bucket_elements(num_parameters: int) -> int:
    """Elements of DeepSpeed's buckets for a rank that computes with so many: all at once, within limits."""
    return min(max(num_parameters, _SMALLEST_BUCKET), _LARGEST_BUCKET)


def uses_bf16_optimizer(config: RunConfig) -> bool:
    """Whether DeepSpeed's BF16_Optimizer is at work: it keeps whole fp32 sums of gradients, and no others."""
    parallel = config.parallel
    return parallel.zero_stage < 2 and config.train.precision == "bf16" and parallel.offload == "none"


def _flat(part: StageModel) -> tuple[int, int]:
    """Elements of the buffers that DeepSpeed lays what it updates into, each of the optimizer's groups into one; a
    rank's share.

    ZeRO 3 cuts each parameter by itself; the others the buffers, whose length is a multiple of 2 for each rank.
    """
    stage, cut = part.config.parallel.zero_stage, part.data if part.config.parallel.zero_stage else 1
    if stage == 3:
        return num_elements(part.updated), _shares(part.updated, cut)
    if stage == 0 and part.config.train.precision == "fp32":  # torch's own optimizer, on the parameters themselves
        return num_elements(part.updated), num_elements(part.updated)
    whole = sum(share(size, 2 * cut) * 2 * cut for size in _groups(part.updated))
    return whole, whole // cut


def _groups(parameters: Iterable[Parameter]) -> list[int]:
    """Elements of each of the optimizer's groups."""
    sizes = dict.fromkeys((True, False), 0)
    for p in parameters:
        sizes[p.decays] += p.numel * p.copies
    return [size for size in sizes.values() if size]


def _weights(part: StageModel) -> int:
    whole, mine = _flat(part)
    frozen = [p for p in part.parameters if not p.is_trained]
    if part.config.parallel.zero_stage == 3:
        return part.element_bytes * (mine + _shares(frozen, part.data))
    return part.element_bytes * (whole + _copied(part) + num_elements(frozen))


def _copied(part: StageModel) -> int:
    """Elements of the copy of a tied weight that is trained, whose gradients add up beside DeepSpeed's."""
    return num_elements(part.trained) - num_elements(part.updated)


def _shares(parameters: Iterable[Parameter], ways: int) -> int:
    """Elements of a rank's shares, where each parameter is cut by itself."""
    return sum(share(p.numel, ways) * p.copies for p in parameters)


def _optimizer(part: StageModel) -> int:
    bytes_ = weight_state_bytes(part.config)
    if part.config.parallel.zero_stage == 0 and part.config.train.precision == "fp32":  # the weights are the masters
        return (bytes_ - 4) * _flat(part)[0] + STEP_BYTES * sum(p.copies for p in part.updated)
    return bytes_ * _flat(part)[1] + STEP_BYTES * len(_groups(part.updated))


def _gradients(part: StageModel) -> int:
    """What is there between two passes of a step.

    In fp32, ZeRO 2 keeps whole the gradients of parameters of which a share has a part: up to two parameters more. ZeRO
    3 steps through sub-groups of a bucket's size: a few bytes more for each.
    """
    whole, mine = _flat(part)
    if uses_bf16_optimizer(part.config):
        return 4 * (whole + _copied(part))
    sums = mine + _copied(part) if part.config.parallel.zero_stage >= 2 else num_elements(part.trained)
    return 4 * (sums + partial_elements(part))


def partial_elements(part: StageModel) -> int:
    """Elements whose gradients' parts on tensor ranks add up beside DeepSpeed's sums, where it has cut those before the
    parts are summed."""
    if part.config.parallel.zero_stage == 0 or uses_bf16_optimizer(part.config):
        return 0
    return num_elements(p for p in part.updated if p.is_partial)


def _owned(part: StageModel) -> int:
    """The most elements that a rank of this kind saves: what ranks hold alike is shared out among them."""
    stage, data = part.config.parallel.zero_stage, part.data
    if stage == 3:
        return saved_elements(part, lambda p: share(p.numel, data))
    if stage == 0:
        return saved_elements(part, lambda p: p.numel, data)
    return min(_flat(part)[1], saved_elements(part, lambda p: p.numel))


def _pass_buffers(part: StageModel) -> dict[str, int]:
    """What DeepSpeed holds while passes are made, beside the gradients."""
    stage, bytes_, size = part.config.parallel.zero_stage, part.element_bytes, part.num_parameters
    bucket = bucket_setting(part, "reduce_bucket_size")
    is_half = bytes_ < 4
    buffers = {"a weight's gradient": bytes_ * max(p.numel for p in part.trained)}
    if stage in (1, 2) and part.config.parallel.offload != "none":
        buffers["a gradient on its way"] = bytes_ * part.largest_parameter
    if stage == 2:  # gradients in their own type, and in fp32 as they travel
        buffers["bucket of gradients"] = (bytes_ + 4 * is_half) * bucket
    if stage == 3:
        live = max(min(size, bucket_setting(part, "stage3_max_live_parameters")), part.largest_parameter)
        buffers |= {"bucket of gradients": 4 * bucket, "gathered weights": bytes_ * live}
    return buffers


def _update_buffers(part: StageModel) -> dict[str, int]:
    """What DeepSpeed holds from the last backward pass to the next forward pass, beside the state."""
    stage, data, size = part.config.parallel.zero_stage, part.data, num_elements(part.trained)
    whole, mine = _flat(part)
    if uses_bf16_optimizer(part.config):  # a buffer a group, copied into one message if the first is not too large
        first, *others = _groups(part.trained)
        is_copied = stage == 1 and data > 1 and others and first <= _ALL_REDUCE_ELEMENTS
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
    if isinstance(value, (int, float)):
        return int(value)
    return bucket_elements(part.num_parameters if key == "stage3_max_live_parameters" else num_elements(part.updated))

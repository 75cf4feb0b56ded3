"""Where DeepSpeed keeps a rank's share of the weights and the optimizer's state, under each of its optimizers.

DeepSpeed flattens parameters into buffers and cuts those among the data ranks. Whatever it does, a rank's share is a
list of slices: elements [start, start + length) of one flattened local parameter lie at ``offset`` of a flat fp32
buffer, which is also the key of the state of the torch optimizer underneath.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


class MasterSlice(NamedTuple):
    """A part of a parameter whose master weights and optimizer state this rank holds."""

    parameter: nn.Parameter
    start: int
    length: int
    buffer: Tensor
    offset: int

    def of(self, buffer: Tensor) -> Tensor:
        """This slice of ``buffer``, which is laid out as the master weights are: a 1-D view."""
        return buffer.detach().view(-1).narrow(0, self.offset, self.length)


def master_slices(optimizer: Any, parameters: list[nn.Parameter]) -> Iterator[MasterSlice]:
    """This rank's slices of ``parameters``, whatever the engine's ``optimizer`` is."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_slices(optimizer, parameters)
    elif isinstance(optimizer, BF16_Optimizer):
        yield from _mapped_slices(optimizer.fp32_groups_flat_partition, parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from _mapped_slices(optimizer.single_partition_of_fp32_groups, parameters)
    else:  # fp32 without ZeRO: torch's own optimizer on the parameters themselves
        yield from (MasterSlice(p, 0, p.numel(), p, 0) for p in parameters)


def is_own(held: MasterSlice, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` has the values of a slice, by some of its elements, in the type that it computes in.

    DeepSpeed's buffers are read by rules that are this module's: this is what shows that they hold. Not collective; it
    waits for the device.
    """
    partition = getattr(parameter, "ds_tensor", None)  # ZeRO 3: of this rank, as the slice is
    own = parameter.detach().view(-1)[held.start :] if partition is None else partition.detach().view(-1)
    step = max((held.length - 1) // 3, 1)
    expected, found = held.of(held.buffer)[::step], own[: held.length : step]
    if expected.shape != found.shape:
        return False
    expected = expected.to(device=found.device, dtype=found.dtype)
    return bool(((expected == found) | (expected.isnan() & found.isnan())).all())


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer underneath, whose ``state`` is keyed by the masters' buffers."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def sync_master_params(optimizer: Any) -> None:
    """After the master weights were written to: give every rank the weights it computes with. Collective."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif isinstance(optimizer, (BF16_Optimizer, DeepSpeedZeroOptimizer)):
        optimizer.update_lp_params()


def link_state(optimizer: Any) -> None:
    """After the optimizer's state was made anew: let DeepSpeed find it where its first step would have."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer._lazy_init_hp_params_optimizer_state()


def _mapped_slices(buffers: list[Tensor], parameters: list[nn.Parameter]) -> Iterator[MasterSlice]:
    for parameter in parameters:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            buffer = buffers[mapping.param_group_index]
            yield MasterSlice(parameter, low.start, low.numel, buffer, high.start)


def _stage3_slices(optimizer: DeepSpeedZeroOptimizer_Stage3, parameters: list[nn.Parameter]) -> Iterator[MasterSlice]:
    for parameter in parameters:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * size
        length = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if length > 0:
            yield MasterSlice(parameter, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)

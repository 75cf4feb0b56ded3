"""The torch optimizer that every sharding works with.

What is used of torch beside what it documents, so that its compiler, a second on each rank, is not loaded where nothing
is compiled; tests/unit/train/test_imports.py fails where it has changed:

| name | reason |
|---|---|
| ``__dynamo_disable`` | of what the compiler is not to trace: unset, the first call loads the compiler to set it |
| ``__wrapped__`` of ``AdamW.step`` | its wrapper loads the compiler to tell it of a graph break |
| ``Optimizer.profile_hook_step`` | what torch wraps ``step`` in: it calls the hooks |
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config import OptimizerConfig, RunConfig
from megatrain.distributed.fragment import AVERAGE, ShardSpec
from megatrain.distributed.groups import Groups

SMALLEST_SCALE = 1.0e-3
"""Adafactor's: so that weights which begin at zero move."""
_PIECE = 1 << 20


def make_optimizer(
    config: RunConfig,
    parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, ShardSpec],
    scale: ParameterScale | None = None,
) -> torch.optim.Optimizer:
    """AdamW in two groups: what decays, and what ``optimizer.no_weight_decay`` names. Torch's fused one, the fastest
    here."""
    optimizer, family = config.optimizer, config.model.description
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        (decaying if optimizer.decays(family.kind_of(specs[name].name)) else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    _keep_compiler_away()
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
    step = inspect.unwrap(type(adamw).step)
    step = adamw.profile_hook_step(torch.no_grad()(step if scale is None else scale.around(step)))
    adamw.step = MethodType(step, adamw)  # type: ignore[method-assign]
    if optimizer.ema_decay is not None:
        _Average(adamw, optimizer.ema_decay)
    return adamw


def _keep_compiler_away() -> None:
    """Mark what each optimizer calls as what the compiler is not to trace, unless the compiler is there to do so."""
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
        if "torch._dynamo" not in sys.modules:
            function: Any = inspect.unwrap(method)
            setattr(function, "__dynamo_disable", function)


def state_kinds(config: OptimizerConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each element, beside the weight itself."""
    return "exp_avg", "exp_avg_sq", *(() if config.ema_decay is None else (AVERAGE,))


class Part(NamedTuple):
    """What this rank updates of a parameter: the tensor that the optimizer has, and the part's elements in it, flat."""

    name: str
    buffer: Tensor
    values: Tensor


class ParameterScale:
    """Adafactor's ``scale_parameter`` (Shazeer and Stern 2018, section 8) for AdamW: the steps of a weight are
    multiplied by the root mean square of its values, and at least by SMALLEST_SCALE; its decay is not.

    The mean is over the whole tensor, wherever its elements are. Adam's step depends on gradients alone: so AdamW gets
    the weights divided by their scale, and what it makes of them is multiplied again, which needs no further memory.
    """

    def __init__(self, specs: Mapping[str, ShardSpec], groups: Groups, *, is_replicated: bool) -> None:
        """``specs``: of what the ranks of this stage update, each in the same order. ``is_replicated``: each data rank
        holds all of it. Collective."""
        self._device, self._stage = groups.device, groups.coordinate.pipeline
        is_counted = not is_replicated or groups.gradient.get_local_rank() == 0
        self._is_counted = {name: is_counted and spec.replica == 0 for name, spec in specs.items()}
        sizes = [math.prod(spec.global_shape) for spec in specs.values()]
        self._sizes = torch.tensor(sizes, dtype=torch.float64, device=groups.device)
        self._shape = groups.topology.pipeline, int(groups.all_reduce_max([float(len(specs))])[0])
        self._scaled: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the buffer's id: its parts with their scales

    @torch.no_grad()
    def measure(self, parts: Iterable[Part]) -> None:
        """Find the scales for the next update, the same to the last bit on all ranks. Collective over all of them."""
        held = [part for part in parts if part.values.numel()]
        counted = [part for part in held if self._is_counted[part.name]]
        squares = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        if counted:
            sums = _sums_of_squares([part.values for part in counted])
            by_name = dict(zip((part.name for part in counted), sums, strict=True))
            own = torch.stack([by_name.get(name, torch.zeros_like(sums[0])) for name in self._is_counted])
            squares[self._stage, : len(own)] = own.to(squares)
        dist.all_reduce(squares)
        mean_squares = squares[self._stage, : len(self._sizes)] / self._sizes
        scales = mean_squares.sqrt().clamp(min=SMALLEST_SCALE).float()
        by_name = dict(zip(self._is_counted, scales.to(held[0].values.device if held else self._device), strict=True))
        self._scaled = {}
        for part in held:
            self._scaled.setdefault(id(part.buffer), []).append((part.values, by_name[part.name]))

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The ``step`` of an optimizer with scaled weights."""

        def scaled_step(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
            pairs = [pair for parameter in _updated(optimizer) for pair in self._scaled.get(id(parameter), ())]
            values, scales = [value for value, _ in pairs], [scale for _, scale in pairs]
            if pairs and (overflow := getattr(optimizer, "found_inf", None)) is not None:  # to leave every bit
                scales = list(torch.where(overflow.bool(), 1.0, torch.stack(scales)))
            if pairs:
                torch._foreach_div_(values, scales)
            step(optimizer, *arguments)
            if pairs:
                torch._foreach_mul_(values, scales)

        return scaled_step


def _sums_of_squares(values: list[Tensor]) -> Sequence[Tensor]:
    """Of each tensor, in double precision. A CPU adds a tensor's squares up in fp32, one after the other: of 10^8 that
    loses 0.3%, so it is given pieces."""
    if not values[0].is_cpu:
        return torch.stack(torch._foreach_norm(values)).double().square().unbind()
    return [torch.stack(torch._foreach_norm(torch.split(each, _PIECE))).double().square().sum() for each in values]


class _Average:
    """An exponential moving average of an optimizer's weights, as one more part of its state: so it is cut, saved,
    loaded and offloaded as the rest of it is.

    The decay rises to its value by min(decay, (1 + n) / (10 + n)) over the first updates n, as in TensorFlow and
    Marian: else a short run would end with an average of its initial weights. n is the optimizer's own count, and stays
    on the device, as does the news that an update is left out for an overflow.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._decay = decay
        self._first: dict[Tensor, Tensor] = {}  # weights before the first update, which the average begins with
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)

    @torch.no_grad()
    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._first = {p: p.clone() for p in _updated(optimizer) if AVERAGE not in optimizer.state.get(p, {})}

    @torch.no_grad()
    def _after_update(self, optimizer: Any, *_: Any) -> None:
        """What DeepSpeedSharding leaves out by hiding its gradients is not counted here either."""
        parameters, begun, self._first = _updated(optimizer), self._first, {}
        if not parameters:
            return
        for parameter, first in begun.items():
            optimizer.state[parameter][AVERAGE] = first
        num_updates = optimizer.state[parameters[0]]["step"]  # of all parameters the same
        share = 1.0 - ((1.0 + num_updates) / (10.0 + num_updates)).clamp(max=self._decay)  # of the new weights
        if (overflow := getattr(optimizer, "found_inf", None)) is not None:
            share = share * (1.0 - overflow)
        averages = [_own(optimizer.state[parameter][AVERAGE]) for parameter in parameters]
        torch._foreach_lerp_(averages, [_own(parameter) for parameter in parameters], [share] * len(averages))


def _updated(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _own(tensor: Tensor) -> Tensor:
    """This rank's rows of FSDP2's DTensor, whose import takes ranks without it half a second; another as it is."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows


def reset_state(state: dict[str, Tensor], parameter: Tensor, kinds: Sequence[str], num_updates: int) -> None:
    """Let the ``state`` of ``parameter`` be zero after ``num_updates`` updates, of all ``kinds``; for 0 what there is
    of it, without an average, which begins with the weights."""
    if num_updates:
        state.update({kind: torch.zeros_like(parameter) for kind in kinds if kind not in state})
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
    else:
        state.pop(AVERAGE, None)
    for value in state.values():
        value.zero_()
    if state:
        state["step"].fill_(float(num_updates))

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
import sys
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.config import OptimizerConfig, RunConfig
from megatrain.distributed.fragment import AVERAGE, ShardSpec


def make_optimizer(
    config: RunConfig, parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ShardSpec]
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
    step = adamw.profile_hook_step(torch.no_grad()(inspect.unwrap(type(adamw).step)))
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
        share: Tensor | None = None  # of the new weights; of all parameters the same
        for parameter in _updated(optimizer):
            state = optimizer.state[parameter]
            if AVERAGE not in state:
                state[AVERAGE] = self._first.pop(parameter)
            if share is None:
                share = 1.0 - ((1.0 + state["step"]) / (10.0 + state["step"])).clamp(max=self._decay)
                if (overflow := getattr(optimizer, "found_inf", None)) is not None:
                    share = share * (1.0 - overflow)
            _own(state[AVERAGE]).lerp_(_own(parameter), share)
        self._first = {}


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

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
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from megatrain.config import RunConfig
from megatrain.distributed.fragment import ShardSpec


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
    return adamw


def _keep_compiler_away() -> None:
    """Mark what each optimizer calls as what the compiler is not to trace, unless the compiler is there to do so."""
    for method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
        if "torch._dynamo" not in sys.modules:
            function: Any = inspect.unwrap(method)
            setattr(function, "__dynamo_disable", function)


def reset_state(state: dict[str, torch.Tensor], parameter: torch.Tensor, num_updates: int) -> None:
    """Let the ``state`` of ``parameter`` be zero after ``num_updates`` updates; made if there is none, but for 0."""
    if not state and num_updates:
        state.update({kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")})
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for value in state.values():
        value.zero_()
    if state:
        state["step"].fill_(float(num_updates))

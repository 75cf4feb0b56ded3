"""The torch optimizer that every sharding works with."""

from __future__ import annotations

from collections.abc import Mapping

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
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )


def reset_state(state: dict[str, torch.Tensor], parameter: torch.Tensor, num_updates: int) -> None:
    """Let the ``state`` of ``parameter`` be zero after ``num_updates`` updates; made if there is none, but for 0."""
    if not state and num_updates:
        state.update({kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")})
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for value in state.values():
        value.zero_()
    if state:
        state["step"].fill_(float(num_updates))

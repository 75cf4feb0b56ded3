"""The torch optimizer that every sharding works with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatrain.config import OptimizerConfig
from megatrain.distributed.fragment import ShardSpec


def make_optimizer(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ShardSpec]
) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, vectors (norms and biases) do not. Torch's fused one, the fastest here."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        (matrices if len(specs[name].global_shape) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
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

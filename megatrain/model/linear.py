"""The matrix products of a layer, with LoRA's adapters where a run trains those (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.model.dropout import Dropout

if TYPE_CHECKING:
    from megatrain.config.schema import LoraConfig


class Linear(nn.Module):
    """y = x W^T + b, and where it is adapted y = x W^T + b + alpha / rank * dropout(x) A^T B^T.

    ``is_conv1d``: W is [in, out], as OpenAI stored it and Hugging Face keeps it; A and B never are. ``reduce``: what a
    parallel layout that cuts the inputs does with the products before the bias is added.
    """

    def __init__(self, num_inputs: int, num_outputs: int, bias: bool, is_conv1d: bool = False) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs, self.is_conv1d = num_inputs, num_outputs, is_conv1d
        shape = (num_inputs, num_outputs) if is_conv1d else (num_outputs, num_inputs)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.scale: float | None = None

    def adapt(self, lora: LoraConfig, seed: int, name: str) -> None:
        """Add an adapter; ``name``: of this module, which decides what its dropout drops."""
        self.lora_A = Linear(self.num_inputs, lora.rank, bias=False)
        self.lora_B = Linear(lora.rank, self.num_outputs, bias=False)
        self.lora_dropout = Dropout(lora.dropout, seed, f"{name}.lora_dropout")
        self.scale = lora.alpha / lora.rank

    def forward(self, x: Tensor, sample_ids_B: Tensor | None = None) -> Tensor:
        """``sample_ids_B``: needed where an adapter has dropout."""
        weight = self.weight.t() if self.is_conv1d else self.weight
        y = functional.linear(x, weight, self.bias if self.reduce is None else None)
        if self.scale is not None:
            low_rank = self.lora_B(self.lora_A(self.lora_dropout(x, sample_ids_B)))
            y = torch.add(y, low_rank, alpha=self.scale)
        if self.reduce is None:
            return y
        y = self.reduce(y)
        return y if self.bias is None else y + self.bias


def add_adapters(model: nn.Module, lora: LoraConfig | None, seed: int = 0) -> None:
    """Freeze ``model``, whose modules have their canonical names, and adapt the matrices that ``lora`` names; with None
    it stays as it is. ``seed``: of dropout."""
    if lora is None:
        return
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and lora.adapts(name):
            module.adapt(lora, seed, name)

"""A decoder layer, built from its family's description: Hugging Face's names and shapes.

B: sequences, T: tokens, C: channels (hidden size), H: query heads, G: key-value heads, D: head dimension, F: MLP width.
Head counts are read off the projections' outputs: the same code runs where a rank holds some of the heads. Modules are
looked up by name in every forward pass, so that a parallel layout can put others in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.families import description
from megatrain.model.attention import CoreAttention
from megatrain.model.context import Context
from megatrain.model.dropout import Dropout
from megatrain.model.linear import Linear
from megatrain.model.norm import LayerNorm, RmsNorm
from megatrain.model.rope import rotate

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class Activation(nn.Module):
    """What stands between the MLP's products, without parameters; times ``up`` where the MLP is gated."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._function = _ACTIVATIONS[kind]

    def forward(self, x_BTF: Tensor, up_BTF: Tensor | None = None) -> Tensor:
        y_BTF = self._function(x_BTF)
        return y_BTF if up_BTF is None else y_BTF * up_BTF


def project_each(block: SelfAttention | Mlp, x_BTC: Tensor, sample_ids_B: Tensor | None) -> Sequence[Tensor]:
    """The products of a block's input with each of its first matrices, in the family's order."""
    return [getattr(block, name)(x_BTC, sample_ids_B) for name in block.input_names]


class SelfAttention(nn.Module):
    """Attention with its projections. ``project``: what computes the first ones, which a layout may replace."""

    def __init__(self, config: ModelConfig, spec: description.Attention, layer: int, seed: int, prefix: str) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        self.rotates = spec.rotates
        self.project = project_each
        self.input_names = [linear.name for linear in spec.inputs]
        self.output_name = spec.output.name
        self.head_norm_names = [norm.name for norm in spec.head_norms]
        _attach(self, spec.modules, config)
        dropout = Dropout(config.attention_dropout, seed, f"{prefix}.core", num_offsets=3)
        self.core = CoreAttention(dropout, config.attention_window, is_causal=spec.is_causal)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        projected = self.project(self, x_BTC, context.sample_ids_B)
        if len(projected) == 1:  # queries, keys and values side by side
            projected = projected[0].chunk(3, -1)
        q_BTHD, k_BTGD, v_BTGD = (torch.unflatten(y, -1, (-1, self.head_dim)) for y in projected)
        if self.head_norm_names:
            query_norm, key_norm = (getattr(self, name) for name in self.head_norm_names)
            q_BTHD, k_BTGD = query_norm(q_BTHD), key_norm(k_BTGD)
        if self.rotates:
            assert context.rotary is not None
            q_BTHD, k_BTGD = rotate(q_BTHD, context.rotary), rotate(k_BTGD, context.rotary)
        if context.cache is not None:
            k_BTGD, v_BTGD = context.cache.update(self.layer, k_BTGD, v_BTGD)
        y_BTHD = self.core(q_BTHD, k_BTGD, v_BTGD, context)
        return getattr(self, self.output_name)(y_BTHD.flatten(2), context.sample_ids_B)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """The MLP, plain or gated. ``project``: as in SelfAttention."""

    def __init__(self, config: ModelConfig, spec: description.Mlp) -> None:
        super().__init__()
        self.project = project_each
        self.input_names = [linear.name for linear in spec.inputs]
        self.output_name = spec.output.name
        _attach(self, spec.modules, config)
        self.activation = Activation(spec.activation)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        y_BTF = self.activation(*self.project(self, x_BTC, context.sample_ids_B))
        return getattr(self, self.output_name)(y_BTF, context.sample_ids_B)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One decoder layer: attention and MLP, each with a norm before it, added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, seed: int) -> None:
        super().__init__()
        self.spec = block = config.description.block
        prefix = f"{block.prefix}.{layer}"
        for module in block.modules:
            if isinstance(module, description.Attention):
                path = f"{prefix}.{module.name}"
                self.add_module(module.name, SelfAttention(config, module, layer, seed, path))
            elif isinstance(module, description.Mlp):
                self.add_module(module.name, Mlp(config, module))
            else:
                self.add_module(module.name, build_norm(module, config))
        self.attention_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.attention_dropout")
        self.mlp_dropout = Dropout(config.hidden_dropout, seed, f"{prefix}.mlp_dropout")

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        block = self.spec
        normed_BTC = getattr(self, block.attention_norm.name)(x_BTC)
        y_BTC = getattr(self, block.attention.name)(normed_BTC, context)
        x_BTC = x_BTC + self.attention_dropout(y_BTC, context.sample_ids_B)
        normed_BTC = getattr(self, block.mlp_norm.name)(x_BTC)
        y_BTC = getattr(self, block.mlp.name)(normed_BTC, context)
        return x_BTC + self.mlp_dropout(y_BTC, context.sample_ids_B)  # type: ignore[no-any-return]


def build_norm(norm: description.Norm, config: ModelConfig) -> nn.Module:
    kind = RmsNorm if norm.kind == "rms" else LayerNorm
    return kind(config.sizes[norm.width], getattr(config, norm.eps_key))


def _build_linear(linear: description.Linear, config: ModelConfig) -> nn.Module:
    num_inputs, num_outputs = config.sizes[linear.inputs], sum(config.sizes[width] for width in linear.outputs)
    return Linear(num_inputs, num_outputs, linear.bias, linear.is_conv1d)


def _attach(parent: nn.Module, modules: tuple[description.Linear | description.Norm, ...], config: ModelConfig) -> None:
    for module in modules:
        if isinstance(module, description.Linear):
            parent.add_module(module.name, _build_linear(module, config))
        else:
            parent.add_module(module.name, build_norm(module, config))

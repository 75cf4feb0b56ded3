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
from megatrain.model.masked_attention import MaskedAttention
from megatrain.model.norm import LayerNorm, RmsNorm
from megatrain.model.rope import rotate

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
}


class Activation(nn.Module):
    """What stands between the MLP's products, without parameters; times ``up`` where the MLP is gated."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._function = _ACTIVATIONS[kind]

    def forward(self, x_BTF: Tensor, up_BTF: Tensor | None = None) -> Tensor:
        y_BTF = self._function(x_BTF)
        return y_BTF if up_BTF is None else y_BTF * up_BTF


def project_each(linears: Sequence[nn.Module], x_BTC: Tensor, sample_ids_B: Tensor | None) -> Sequence[Tensor]:
    """The products of a block's input with each of its first matrices, in the family's order."""
    return [linear(x_BTC, sample_ids_B) for linear in linears]


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
        self.core: CoreAttention | MaskedAttention = CoreAttention(
            dropout, config.attention_window, is_causal=spec.is_causal
        )
        if spec.relative_bias is not None:
            self.core = MaskedAttention(dropout, is_scaled=spec.is_scaled)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        inputs = [self.get_submodule(name) for name in self.input_names]
        projected = self.project(inputs, x_BTC, context.sample_ids_B)
        if len(projected) == 1:  # queries, keys and values side by side
            projected = projected[0].chunk(3, -1)
        q_BTHD, k_BTGD, v_BTGD = (torch.unflatten(y, -1, (-1, self.head_dim)) for y in projected)
        if self.head_norm_names:
            query_norm, key_norm = (self.get_submodule(name) for name in self.head_norm_names)
            q_BTHD, k_BTGD = query_norm(q_BTHD), key_norm(k_BTGD)
        if self.rotates:
            assert context.rotary is not None
            q_BTHD, k_BTGD = rotate(q_BTHD, context.rotary), rotate(k_BTGD, context.rotary)
        if context.cache is not None:
            k_BTGD, v_BTGD = context.cache.update(self.layer, k_BTGD, v_BTGD)
        if isinstance(self.core, MaskedAttention):
            y_BTHD = self.core(q_BTHD, k_BTGD, v_BTGD, context.bias_BHTS, context.sample_ids_B)
        else:
            y_BTHD = self.core(q_BTHD, k_BTGD, v_BTGD, context)
        return self.get_submodule(self.output_name)(y_BTHD.flatten(2), context.sample_ids_B)  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """A decoder's attention to an encoder's output. ``project``: as in SelfAttention, of the queries; what keys and
    values are made of, a layout has made whole before."""

    def __init__(self, config: ModelConfig, spec: description.Attention, layer: int, seed: int, prefix: str) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_size
        self.project = project_each
        self.input_names = [linear.name for linear in spec.inputs]
        self.output_name = spec.output.name
        _attach(self, spec.modules, config)
        dropout = Dropout(config.attention_dropout, seed, f"{prefix}.core", num_offsets=3)
        self.core = MaskedAttention(dropout, is_scaled=spec.is_scaled)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        encoded = context.encoded
        assert encoded is not None
        query, *others = [self.get_submodule(name) for name in self.input_names]
        (q_BTX,) = self.project([query], x_BTC, context.sample_ids_B)
        known = None if encoded.keys_values is None else encoded.keys_values.get(self.layer)
        keys_values = known or [linear(encoded.hidden_BSC, context.sample_ids_B) for linear in others]
        if encoded.keys_values is not None:
            encoded.keys_values[self.layer] = keys_values
        heads = [torch.unflatten(y, -1, (-1, self.head_dim)) for y in (q_BTX, *keys_values)]
        y_BTHD = self.core(*heads, encoded.mask_B1TS, context.sample_ids_B)
        return self.get_submodule(self.output_name)(y_BTHD.flatten(2), context.sample_ids_B)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """The MLP, plain or gated. ``project``: as in SelfAttention. ``home``: the module that has its matrices, where it
    is another one."""

    def __init__(self, config: ModelConfig, spec: description.Mlp, home: nn.Module | None = None) -> None:
        super().__init__()
        self.project = project_each
        self.input_names = [linear.name for linear in spec.inputs]
        self.output_name = spec.output.name
        self._home = [home or self]  # in a list: no second name for the matrices
        _attach(self._home[0], spec.modules, config)
        self.activation = Activation(spec.activation)

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        linear = self._home[0].get_submodule
        inputs = [linear(name) for name in self.input_names]
        y_BTF = self.activation(*self.project(inputs, x_BTC, context.sample_ids_B))
        return linear(self.output_name)(y_BTF, context.sample_ids_B)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One layer of a stack: attention and MLP, each with a norm before it, added to the residual stream; or each with a
    norm behind the sum."""

    def __init__(self, config: ModelConfig, block: description.Block, layer: int, seed: int) -> None:
        super().__init__()
        self.is_post_norm = block.is_post_norm
        prefix = f"{block.prefix}.{layer}"
        paths: dict[description.Module, str] = {}
        for module in block.modules:
            paths[module] = path = module.name or "mlp"
            if module is block.cross_attention:
                attach(self, path, CrossAttention(config, module, layer, seed, f"{prefix}.{path}"))
            elif isinstance(module, description.Attention):
                attach(self, path, SelfAttention(config, module, layer, seed, f"{prefix}.{path}"))
            elif isinstance(module, description.Mlp):
                attach(self, path, Mlp(config, module, None if module.name else self))
            else:
                attach(self, path, build_norm(module, config))
        self.branches = [(paths[norm], paths[part], f"{role}_dropout") for role, (norm, part) in block.branches.items()]
        for _, _, name in self.branches:
            self.add_module(name, Dropout(config.hidden_dropout, seed, f"{prefix}.{name}"))

    def forward(self, x_BTC: Tensor, context: Context) -> Tensor:
        for norm, part, dropout in self.branches:
            read_BTC = x_BTC if self.is_post_norm else self.get_submodule(norm)(x_BTC)
            y_BTC = self.get_submodule(part)(read_BTC, context)
            x_BTC = x_BTC + self.get_submodule(dropout)(y_BTC, context.sample_ids_B)
            x_BTC = self.get_submodule(norm)(x_BTC) if self.is_post_norm else x_BTC
        return x_BTC


def attach(parent: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted path, so that state_dict() has the canonical names."""
    *outer, name = path.split(".")
    for part in outer:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(name, module)


def build_norm(norm: description.Norm, config: ModelConfig) -> nn.Module:
    kind = RmsNorm if norm.kind == "rms" else LayerNorm
    return kind(config.sizes[norm.width], getattr(config, norm.eps_key))


def _build_linear(linear: description.Linear, config: ModelConfig) -> nn.Module:
    num_inputs, num_outputs = config.sizes[linear.inputs], sum(config.sizes[width] for width in linear.outputs)
    return Linear(num_inputs, num_outputs, linear.bias, linear.is_conv1d)


def _attach(parent: nn.Module, modules: tuple[description.Linear | description.Norm, ...], config: ModelConfig) -> None:
    for module in modules:
        if isinstance(module, description.Linear):
            attach(parent, module.name, _build_linear(module, config))
        else:
            attach(parent, module.name, build_norm(module, config))

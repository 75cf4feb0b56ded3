"""Initial weights: each element a function of (seed, canonical parameter name, its flat index in the global tensor).

So any slice of any parameter is made by itself, under every layout, and without communication. Elements are normal, by
the inverse of the distribution's function: a hash of the counter chooses a place on a table of the quantiles, and what
lies between two of its points is interpolated. That takes only integer operations, look-ups, and single fp32
multiplications, additions and subtractions in kernels of their own, each exactly rounded: CPU and GPU give equal bits.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatrain.distributed import rng
from megatrain.distributed.fragment import FlatShard, TensorSlice

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 16, 1 << 22
"""Made at once: on a CPU their 64-bit counters stay in its cache, on a GPU kernels take longer than their start."""

_TABLE_BITS = 14  # intervals of the table, as a power of two
_FRACTION_BITS = 24  # what an fp32 holds exactly


class InitialWeights:
    """The initial weights as a source of shards: like a checkpoint that is computed instead of read, on the device that
    has them."""

    is_computed = True

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def read(self, wanted: FlatShard, kind: str) -> Tensor:
        """The shard's initial weights: 1-D, fp32, on the CPU. The optimizer has no initial state (ValueError)."""
        out = torch.empty(wanted.length)
        self.read_into(out, wanted, kind)
        return out

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """The same into ``target``: 1-D, fp32, on any device, which computes them."""
        if kind != "weight":
            raise ValueError(f"there is no initial {kind}")
        size = CHUNK_ELEMENTS if target.is_cpu else _GPU_CHUNK_ELEMENTS
        for first in range(0, wanted.length, size):
            last = min(first + size, wanted.length)
            local = torch.arange(wanted.start + first, wanted.start + last, device=target.device)
            index = _global_index(local, wanted)
            target[first:last] = self._values(index, wanted.name, wanted.global_shape)

    def _values(self, index: Tensor, name: str, shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:  # norms and biases
            return torch.full(index.shape, 0.0 if name.endswith(".bias") else 1.0, device=index.device)
        if name.endswith(".lora_B.weight"):  # so that the first step begins from the base model
            return torch.zeros(index.shape, device=index.device)
        if name.endswith(".lora_A.weight"):  # peft's: kaiming_uniform_ with a = sqrt(5), over all inputs of the matrix
            return uniform(rng.stream_key(self._seed, name), index).mul_(1.0 / math.sqrt(shape[1]))
        return normal(rng.stream_key(self._seed, name), index).mul_(standard_deviation(name, self._config))


@torch.no_grad()
def init_model(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill a whole model on one device."""
    weights = InitialWeights(config, seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        shard = FlatShard(name, shape, TensorSlice((0,) * len(shape), shape), 0, parameter.numel())
        values = torch.empty(parameter.numel(), device=parameter.device)
        weights.read_into(values, shard, "weight")
        parameter.copy_(values.view(shape))


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Of a matrix or embedding: the family's own, or ``initializer_range``, scaled by ``init_scheme`` where it writes
    to the residual.

    "gpt2": 1 / sqrt(2 x layers) (Radford et al. 2019); "depth": 1 / sqrt(2 x (layer + 1)); "normal": not scaled.
    """
    module = name.rpartition(".")[0]
    if config.description.initial_deviation is not None:
        return config.description.initial_deviation(module, config.sizes)
    layer = re.search(r"\.(\d+)\.", name)
    if (
        config.init_scheme == "normal"
        or layer is None
        or not module.endswith(config.description.block.residual_projections)
    ):
        return config.initializer_range
    depth = config.num_hidden_layers if config.init_scheme == "gpt2" else int(layer[1]) + 1
    return config.initializer_range / math.sqrt(2 * depth)


def uniform(key: int, index: Tensor) -> Tensor:
    """An fp32 number in [-1, 1) for each counter (int64) of the stream ``key``."""
    return (rng.bits_64(key, index) >> (63 - _FRACTION_BITS)).float().mul_(2.0**-_FRACTION_BITS)


def normal(key: int, index: Tensor) -> Tensor:
    """A standard normal fp32 number for each counter (int64) of the stream ``key``; within 4.3 of zero."""
    bits = rng.bits_64(key, index)
    points, steps = _quantiles(index.device)
    place = (bits >> _FRACTION_BITS) & ((1 << _TABLE_BITS) - 1)
    fraction = (bits & ((1 << _FRACTION_BITS) - 1)).float().mul_(2.0**-_FRACTION_BITS)
    magnitude = steps[place].mul_(fraction).add_(points[place])
    return magnitude.mul_((bits >> 63).mul_(2).add_(1))  # the top bit, shifted down arithmetically, is 0 or -1


@functools.cache
def _quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Quantiles of |z| for a standard normal z at 0, 1/K, ... (K-1)/K, and the step from each to the next.

    The step to the last, which is infinite, is made finite, and all are scaled so that the variance is one.
    """
    num_intervals = 1 << _TABLE_BITS
    inverse = NormalDist().inv_cdf
    points = [inverse(0.5 + 0.5 * i / num_intervals) for i in range(num_intervals)]
    points.append(inverse(1.0 - 0.125 / num_intervals))
    # A number drawn uniformly between a and b has the mean square (a^2 + ab + b^2) / 3.
    squares = math.fsum((a * a + a * b + b * b) / 3 for a, b in itertools.pairwise(points))
    scale = 1.0 / math.sqrt(squares / num_intervals)
    scaled = torch.tensor(points, dtype=torch.float64, device="cpu") * scale
    return scaled[:-1].float().to(device), scaled.diff().float().to(device)


def _global_index(local: Tensor, shard: FlatShard) -> Tensor:
    """Flat indices in a shard's tensor_slice to flat indices in the global tensor."""
    if shard.tensor_slice.extent == shard.global_shape:
        return local
    index, stride = torch.zeros_like(local), 1
    dims = list(zip(shard.tensor_slice.offset, shard.tensor_slice.extent, shard.global_shape, strict=True))
    for offset, extent, size in reversed(dims):
        index += (local % extent + offset) * stride
        local = local // extent
        stride *= size
    return index

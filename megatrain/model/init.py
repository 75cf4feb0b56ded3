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
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatrain.distributed import rng
from megatrain.distributed.fragment import Box, Placement
from megatrain.model.families import family_of

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

# Elements made at once on a CPU: their 64-bit counters stay in its cache.
CHUNK_ELEMENTS = 1 << 16

_TABLE_BITS = 14  # intervals of the table, as a power of two
_FRACTION_BITS = 24  # what an fp32 holds exactly


def init_model(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a model that one device holds whole, under canonical names."""
    for name, parameter in model.named_parameters():
        init_parameter(parameter, Placement.whole(name, parameter.shape), config, seed)


@torch.no_grad()
def init_parameter(local: Tensor, placement: Placement, config: ModelConfig, seed: int) -> None:
    """Fill a rank's parameter with its slice of the initial weights; padding becomes zero.

    Works for any type and device, in memory bounded by the chunk, whatever the parameter's size.
    """
    if tuple(local.shape) != placement.local_shape:
        raise ValueError(f"{placement.name}: shape {tuple(local.shape)}, its placement says {placement.local_shape}")
    if placement.padding:
        local.narrow(placement.dim, local.shape[placement.dim] - placement.padding, placement.padding).zero_()
    start = 0
    for box in placement.boxes:
        extent = box.extent[placement.dim] if box.extent else 1
        part = local.narrow(placement.dim, start, extent) if box.extent else local
        start += extent
        _fill_box(part, box, placement, config, seed)


@torch.no_grad()
def init_flat(out: Tensor, name: str, global_shape: Sequence[int], start: int, config: ModelConfig, seed: int) -> None:
    """Fill the vector ``out`` with elements ``[start, start + len(out))`` of the flattened parameter.

    What lies past the parameter's end, where ZeRO pads, becomes zero.
    """
    num_elements = max(0, min(len(out), math.prod(global_shape) - start))
    out[num_elements:].zero_()
    chunk = _chunk_elements(out.device)
    for first in range(0, num_elements, chunk):
        last = min(first + chunk, num_elements)
        index = torch.arange(start + first, start + last, device=out.device)
        out[first:last] = _values(index, name, len(global_shape), config, seed)


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Of a matrix or embedding: ``initializer_range``, scaled by ``init_scheme`` where it writes to the residual.

    "gpt2": 1 / sqrt(2 x layers) (Radford et al. 2019); "depth": 1 / sqrt(2 x (layer + 1)); "normal": not scaled.
    """
    module = name.rpartition(".")[0]
    layer = re.search(r"\.(\d+)\.", name)
    if config.init_scheme == "normal" or layer is None or not module.endswith(family_of(config).residual_projections):
        return config.initializer_range
    depth = config.num_hidden_layers if config.init_scheme == "gpt2" else int(layer[1]) + 1
    return config.initializer_range / math.sqrt(2 * depth)


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


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS if device.type == "cpu" else 1 << 24


def _values(index: Tensor, name: str, num_dims: int, config: ModelConfig, seed: int) -> Tensor:
    if num_dims == 1:  # norms and biases
        return torch.full(index.shape, 0.0 if name.endswith(".bias") else 1.0, device=index.device)
    return normal(rng.stream_key(seed, name), index).mul_(standard_deviation(name, config))


def _fill_box(part: Tensor, box: Box, placement: Placement, config: ModelConfig, seed: int) -> None:
    for rows in _row_blocks(part):
        index = torch.zeros((), dtype=torch.int64, device=part.device)
        for dim, size in enumerate(placement.global_shape):
            first = box.offset[dim] + rows[dim].start
            coordinate = torch.arange(first, first + rows[dim].stop - rows[dim].start, device=part.device)
            index = index.unsqueeze(-1) * size + coordinate
        part[rows] = _values(index, placement.name, len(placement.global_shape), config, seed)


def _row_blocks(part: Tensor) -> Iterator[tuple[slice, ...]]:
    """Blocks of whole rows (entries of the first dimension), each about a chunk, or one row where rows are longer."""
    num_rows = len(part) if part.dim() else 0
    rows_at_once = max(1, _chunk_elements(part.device) // max(1, math.prod(part.shape[1:])))
    rest = tuple(slice(0, size) for size in part.shape[1:])
    for first in range(0, num_rows, rows_at_once):
        yield (slice(first, min(first + rows_at_once, num_rows)), *rest)

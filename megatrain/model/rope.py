"""Rotary position embedding (Su et al. 2021), in Hugging Face's layout: dimension i is rotated with i + D/2.

B: sequences, T: tokens, H: heads, D: head dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class Rotary(NamedTuple):
    """Cosine and sine of each position's angles, [B, T, 1, D / 2] each: they broadcast over heads."""

    cos_BT1E: Tensor
    sin_BT1E: Tensor


class RotaryEmbedding:
    """Positions to cosines and sines. No module: no cast of the weights may touch its angles."""

    def __init__(self, config: ModelConfig) -> None:
        self._inverse_frequencies = {torch.device("cpu"): inverse_frequencies(config)}

    def __call__(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotary:
        """Angles are computed in fp32, then their cosines and sines rounded to ``dtype``, as transformers does."""
        device = positions_BT.device
        if device not in self._inverse_frequencies:
            self._inverse_frequencies[device] = self._inverse_frequencies[torch.device("cpu")].to(device)
        angles_BT1E = positions_BT[..., None, None].float() * self._inverse_frequencies[device]
        return Rotary(angles_BT1E.cos().to(dtype), angles_BT1E.sin().to(dtype))


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each of the D / 2 planes, scaled as ``rope_scaling`` says; fp32 on the CPU."""
    dim = config.head_size
    exponent_E = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies_E = 1.0 / (config.rope_theta**exponent_E)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies_E
    if scaling.rope_type == "linear":
        return frequencies_E / scaling.factor
    return _scale_llama3(frequencies_E, scaling)


def _scale_llama3(frequencies_E: Tensor, scaling: Any) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated.

    Operation by operation that of transformers (``_compute_llama3_parameters``), so that all bits are equal.
    """
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths_E = 2 * math.pi / frequencies_E
    stretched_E = torch.where(wavelengths_E > original / low, frequencies_E / scaling.factor, frequencies_E)
    smooth_E = (original / wavelengths_E - low) / (high - low)
    between_E = (1 - smooth_E) * stretched_E / scaling.factor + smooth_E * stretched_E
    is_between_E = ~(wavelengths_E < original / high) & ~(wavelengths_E > original / low)
    return torch.where(is_between_E, between_E, stretched_E)


class _Rotate(torch.autograd.Function):
    """Rotation of each plane (x_i, x_{i + D/2}). Its gradient is the rotation back, so only the angles are saved."""

    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BTHD, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BTHD, cos, sin, -1.0), None, None


def _rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x_BTHD.chunk(2, -1)
    # Products with the cosine in one pass, then the rest in place: no `out=`, which the compiler does not take.
    out: Tensor = (x_BTHD.unflatten(-1, (2, -1)) * cos.unsqueeze(-2)).flatten(-2)  # type: ignore[no-untyped-call]
    out_first, out_second = out.chunk(2, -1)
    out_first.addcmul_(second, sin, value=-direction)
    out_second.addcmul_(first, sin, value=direction)
    return out


def rotate(x_BTHD: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys, rotated by the angle of their position."""
    out: Tensor = _Rotate.apply(x_BTHD, rotary.cos_BT1E, rotary.sin_BT1E)  # type: ignore[no-untyped-call]
    return out

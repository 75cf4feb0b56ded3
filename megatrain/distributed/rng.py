"""Counter-based random numbers: a value is a hash of where it stands, so there is no random state to keep or restore.

Every function is a pure function of integers, made of wrapping integer arithmetic alone: the same bits on every device,
in every layout, and again when activations are recomputed.

B: samples; other dimensions are whatever the caller's tensor has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

_MASK_64 = (1 << 64) - 1
# 2^64 / golden ratio, odd: successive multiples are spread evenly over the 64-bit integers (SplitMix64's increment).
_GOLDEN = 0x9E3779B97F4A7C15


def signed(value: int, num_bits: int = 64) -> int:
    """``value`` modulo 2^num_bits as the two's complement number that a torch tensor holds."""
    value &= (1 << num_bits) - 1
    return value - (1 << num_bits) if value >> (num_bits - 1) else value


def stream_key(seed: int, name: str) -> int:
    """A 64-bit key for the stream of random numbers called ``name`` (a parameter, a place where dropout acts)."""
    return signed(xxhash.xxh3_64_intdigest(name.encode(), seed & _MASK_64))


def _shift_right(x: Tensor, num_bits: int, width: int) -> Tensor:
    # torch shifts signed integers arithmetically; the hashes below need zeros from the left.
    return (x >> num_bits).bitwise_and_((1 << (width - num_bits)) - 1)


def mix_64(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) of each element of an int64 tensor."""
    x = x ^ _shift_right(x, 30, 64)
    x.mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27, 64))
    x.mul_(signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31, 64))


def mix_32(columns: Tensor, rows: Tensor) -> Tensor:
    """A hash of each column's counter (int32) and each row's 64 bits (int64): int32, [*rows.shape, columns].

    The finalizer "lowbias32" (C. Wellons, hash-prospector), with half of the row's bits put in before each product.
    """
    low, high = rows.to(torch.int32).unsqueeze(-1), (rows >> 32).to(torch.int32).unsqueeze(-1)
    x = columns ^ low
    x.bitwise_xor_(_shift_right(x, 16, 32)).mul_(signed(0x7FEB352D, 32)).add_(high)
    x.bitwise_xor_(_shift_right(x, 15, 32)).mul_(signed(0x846CA68B, 32))
    return x.bitwise_xor_(_shift_right(x, 16, 32))


def bits_64(key: int, index: Tensor) -> Tensor:
    """64 random bits for each counter in ``index`` (int64) of the stream ``key``: SplitMix64 at that position."""
    return mix_64(index * signed(_GOLDEN) + key)


def bits_32(key: int, sample_ids_B: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """32 random bits (int32) for each element of a tensor of ``shape``, whose first dimension is the samples.

    An element's bits depend on ``key``, its sample's id, and its index in each further dimension plus that dimension's
    entry of ``offsets`` (where a rank holds a slice), on nothing else. All but the last dimension are hashed in 64
    bits; the last, where the cost is, in 32.
    """
    hashes = _opaque_hashes if torch.compiler.is_compiling() else _hashes
    return mix_32(*hashes(sample_ids_B, key, list(shape), list(offsets)))


def _hashes(sample_ids_B: Tensor, key: int, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Of each index in the last dimension 32 bits; of each in all others together 64."""
    device = sample_ids_B.device
    rows = bits_64(key, sample_ids_B)
    for size, offset in zip(shape[1:-1], offsets[:-1], strict=True):
        index = torch.arange(offset, offset + size, device=device)
        rows = bits_64(key, rows.unsqueeze(-1) + index)
    columns = torch.arange(offsets[-1], offsets[-1] + shape[-1], device=device)
    return mix_64(columns * signed(_GOLDEN) + key).to(torch.int32), rows


# The compiler computes with indices in integers that do not wrap at 64 bits, and gets other hashes (torch 2.13).
_opaque_hashes = torch.library.custom_op("megatrain::hashes", _hashes, mutates_args=())


@_opaque_hashes.register_fake
def _(sample_ids_B: Tensor, key: int, shape: list[int], offsets: list[int]) -> tuple[Tensor, Tensor]:
    return sample_ids_B.new_empty(shape[-1], dtype=torch.int32), sample_ids_B.new_empty(shape[:-1])


def dropout(x: Tensor, probability: float, key: int, sample_ids_B: Tensor, offsets: Sequence[int]) -> Tensor:
    """Zero each element of ``x`` (first dimension: samples) with ``probability``; scale the others to keep the mean.

    ``offsets``: index of ``x``'s first element in each dimension after the first, where ``x`` is a slice of a larger
    tensor. Which elements are dropped is decided by :func:`bits_32`.
    """
    threshold = round(probability * (1 << 32)) - (1 << 31)
    keep = bits_32(key, sample_ids_B, x.shape, offsets) >= threshold
    return torch.where(keep, x * (1.0 / (1.0 - probability)), 0.0)

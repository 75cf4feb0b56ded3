"""What is left to fp32 in half precision: the scale of the loss, and the softmax over the vocabulary, by blocks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatrain.plan.activations import LARGEST_SOFTMAX_BYTES

_CPU_SOFTMAX_BYTES = 4 << 20  # stays in the cache of a core
_SHARE_OF_MEMORY = 1 / 256


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """``x`` times ``scale``, in fp32, and rounded once.

    A scale rounded to bf16 would make every gradient of the model wrong by the same 0.2%. Engines pass a power of two,
    which loses no bit (megatrain.parallel.loss_scale).
    """
    return x if scale is None else (x.float() * scale).to(x.dtype)


def sum_of_rows(grad_NV: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a bias, in fp32 and rounded once."""
    return (grad_NV.sum(0, dtype=torch.float32) * scale).to(grad_NV.dtype)


def softmax_blocks(logits_NV: Tensor) -> list[slice]:
    """Rows of logits whose softmax in fp32 is computed at once: as many as the device's work space holds."""
    num_rows = max(1, _softmax_bytes(logits_NV.device) // (4 * max(1, logits_NV.shape[1])))
    return [slice(start, start + num_rows) for start in range(0, len(logits_NV), num_rows)]


@functools.cache
def _softmax_bytes(device: torch.device) -> int:
    """On a GPU a kernel then takes many times as long as its start, and the space is a small part of its memory."""
    if device.type != "cuda":
        return _CPU_SOFTMAX_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(int(_SHARE_OF_MEMORY * memory), LARGEST_SOFTMAX_BYTES)

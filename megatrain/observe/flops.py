"""Model FLOPs utilization: what share of the device's peak the model's own operations reach."""

from __future__ import annotations

import time

import torch

from megatrain.plan.hardware import find_device

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of the device of one rank, None where it is not known.

    A GPU's is its dense bf16 peak from the table, whatever ``precision`` is: the definition of ``mfu``. A CPU's is
    measured (0.3 s) in ``precision`` (bf16, fp16 or fp32) with the threads that torch has now.
    """
    if device.type == "cpu":
        return measure_cpu_peak(_DTYPES[precision])
    found = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found.half_flops if found else None


def measure_cpu_peak(dtype: torch.dtype, budget_seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of several square matrix products in ``dtype``, with the threads that torch has now.

    The size is doubled as long as the next product fits the time: large ones come closest to the peak.
    """
    deadline = time.perf_counter() + budget_seconds
    best, size = 0.0, 128
    a, b = _square(size, dtype), _square(size, dtype)
    torch.mm(a, b)  # the first product also pays for starting the threads
    while True:
        started = time.perf_counter()
        torch.mm(a, b)
        ended = time.perf_counter()
        best = max(best, 2 * size**3 / (ended - started))
        if ended + (ended - started) > deadline:
            return best
        if size < 2048 and ended + 32 * (ended - started) < deadline:
            size *= 2
            a, b = _square(size, dtype), _square(size, dtype)


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None, num_devices: int) -> float | None:
    """Share of ``num_devices`` times ``peak_flops`` that the whole job's ``tokens_per_second`` make use of."""
    return tokens_per_second * flops_per_token / (peak_flops * num_devices) if peak_flops else None


def _square(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((size, size), 0.5, dtype=dtype)

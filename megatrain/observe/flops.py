"""Model FLOPs utilization: what share of the device's peak the model's own operations reach."""

from __future__ import annotations

import torch

from megatrain.plan.hardware import find_device


def peak_flops(device: torch.device, measured: float | None) -> float | None:
    """Peak FLOP/s of the device of one rank: as ``measured``, else a GPU's dense bf16 peak from the table (whatever
    the precision is: the definition of ``mfu``).

    None where it is not known. A CPU's is not: what ranks measure while they share its cores, or others use it, is
    anything but its peak.
    """
    if measured is not None or device.type != "cuda":
        return measured
    found = find_device(torch.cuda.get_device_name(device))
    return found.half_flops if found else None


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None, num_devices: int) -> float | None:
    """Share of ``num_devices`` times ``peak_flops`` that the whole job's ``tokens_per_second`` make use of."""
    return tokens_per_second * flops_per_token / (peak_flops * num_devices) if peak_flops else None

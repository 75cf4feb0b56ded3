"""A fixed piece of arithmetic: on equal devices it takes equally long, but where one is throttled."""

from __future__ import annotations

import time

import torch

_SIZE, _REPEATS = {"cuda": 4096, "cpu": 384}, {"cuda": 20, "cpu": 125}
"""On a core of a CPU some 0.15 s: longer than the period in which a control group shares out time (0.1 s)."""


def arithmetic_seconds(device: torch.device) -> float:
    """Seconds that the same matrix products take on ``device``, on all threads that torch has."""
    kind = device.type if device.type in _SIZE else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    x = torch.full((_SIZE[kind], _SIZE[kind]), 1.0 / _SIZE[kind], dtype=dtype, device=device)
    x @ x  # the first one makes what libraries keep
    _wait(device)
    began = time.perf_counter()
    for _ in range(_REPEATS[kind]):
        x = x @ x
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

from collections.abc import Callable

import pytest

from megatrain.observe.metrics import StepMetrics

MakeStep = Callable[..., StepMetrics]


@pytest.fixture
def make_step() -> MakeStep:
    def make(step: int, **figures: object) -> StepMetrics:
        parts = {"data": 0.01, "forward_backward": 0.4, "optimizer": 0.05, "save": 0.0, "eval": 0.0, "other": 0.04}
        known: dict[str, object] = {
            "step": step,
            "tokens": step * 2048,
            "loss": 9.0 - step / 100,
            "grad_norm": 1.5,
            "lr": 1e-3,
            "step_seconds": 0.5,
            "tokens_per_second": 4096.0,
            "mfu": 0.31,
            "skipped": 0,
            "memory_bytes": 2**30,
            "parts": parts,
        }
        return StepMetrics(**{**known, **figures})

    return make

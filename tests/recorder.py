"""A callback for runs; a module of its own, for the process that imports it is to load little else."""

from __future__ import annotations

from collections.abc import Mapping

import megatrain
from megatrain.observe.metrics import StepMetrics


class Recorder(megatrain.Callback):
    """Keeps what it was called with; asks for the end after step 3."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_step(self, metrics: StepMetrics) -> bool:
        self.calls.append(("step", metrics.step))
        return metrics.step == 3

    def on_validation(self, step: int, loss: float, losses: Mapping[str, float]) -> None:
        assert loss > 0
        assert len(losses) == 1
        self.calls.append(("validation", step))

    def on_save(self, step: int, path: str) -> None:
        assert path.endswith(f"step-{step:08}")
        self.calls.append(("save", step))

    def on_event(self, name: str, step: int, message: str) -> None:
        self.calls.append((name, step))

    def on_end(self, step: int, message: str) -> None:
        self.calls.append(("end", step))

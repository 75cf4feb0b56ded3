"""What a user's own code sees of a run that it trains from Python."""

from __future__ import annotations

from collections.abc import Mapping

from megatrain.observe.metrics import StepMetrics, TaskFigures


class Callback:
    """Override what you need. A method that returns True asks the run to stop: it ends after the next step, its
    state saved.

    What one raises ends the run. Methods are called on rank 0, between steps: the run waits for them.
    """

    def on_step(self, metrics: StepMetrics) -> bool | None:
        """A step was logged (every `observe.log_every_steps`): loss, grad_norm, lr, tokens, step_seconds, ..."""

    def on_validation(self, step: int, loss: float, losses: Mapping[str, float]) -> bool | None:
        """An evaluation after ``step`` steps: the loss over data.validation, and that of each dataset by its name."""

    def on_tasks(self, step: int, figures: TaskFigures) -> bool | None:
        """train.tasks were answered after ``step`` steps: by task and metric value, stderr and n."""

    def on_save(self, step: int, path: str) -> bool | None:
        """The checkpoint of ``step`` is safe at ``path``."""

    def on_event(self, name: str, step: int, message: str) -> bool | None:
        """What else happened: an update that was skipped, a straggler, a save that failed, ..."""

    def on_end(self, step: int, message: str) -> None:
        """The run ends after ``step`` steps, and why."""

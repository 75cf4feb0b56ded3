"""The last moment before an update: its gradient is summed and measured, and no weight is changed yet.

Each of DeepSpeed's optimizers calls the torch optimizer underneath after it has the global norm, once for each of its
groups. An update that is left out there leaves weights and moments as they were, under every stage alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class UpdateGuard:
    """Stands before an optimizer's ``step``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update = optimizer.step
        self._admits: Callable[[], bool] | None = None
        self._answer: bool | None = None
        optimizer.step = self._step  # type: ignore[method-assign]

    def open_for(self, admits: Callable[[], bool] | None) -> None:
        """Ask ``admits`` once before the next update; None: make it."""
        self._admits, self._answer = admits, None

    @property
    def refused(self) -> bool:
        """Whether the last update was left out here."""
        return self._answer is False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._answer is None:
            self._answer = self._admits is None or self._admits()
        return self._update(*args, **kwargs) if self._answer else None

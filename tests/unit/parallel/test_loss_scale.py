"""fp16's loss scale goes as DeepSpeed's does, so that what a run of before has saved goes on."""

from __future__ import annotations

import random

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler

from megatrain.parallel.loss_scale import DynamicLossScale


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_dynamic_scale_moves_as_deepspeeds(window: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 writes a log of it
    given = {"init_scale": 2.0**6, "scale_window": window, "min_scale": 1.0, "delayed_shift": 2}
    settings = {**given, "consecutive_hysteresis": False, "raise_error_at_min_scale": False}
    theirs = loss_scaler.CreateLossScaler(torch.half, 0, dynamic_scaling=True, dynamic_loss_args=settings)
    ours = DynamicLossScale(window, 2.0**6, torch.device("cpu"))
    chance = random.Random(window)
    for _ in range(300):
        overflow = chance.random() < rate
        theirs.update_scale(overflow)
        ours.update(overflow=torch.tensor(overflow))
        assert ours.state() == {key: getattr(theirs, key) for key in ours.state()}

"""How often a run sees its datasets: as its samples say, and told where it is too often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatrain.config import RunConfig
from megatrain.data import open_dataset
from megatrain.data.epochs import Epochs, epochs_of, planned_epochs
from megatrain.data.order import DataOrder, SamplingSettings
from tests.runs import TinyData, tiny_config


def test_planned_epochs_match_the_samples_seen(tiny_data: TinyData) -> None:
    config = RunConfig.model_validate(tiny_config(tiny_data, Path("run"), train={"steps": 300}))
    windows = [(open_dataset(path).num_tokens - 1) // 64 for path in (tiny_data.prose, tiny_data.code)]
    order = DataOrder.begin(7, SamplingSettings(8, (2.0, 1.0), 64, tuple(windows)))
    seen = np.bincount(np.concatenate([order.batch(step).dataset for step in range(300)]))
    planned = planned_epochs(config)
    assert [each.path for each in planned] == [str(tiny_data.prose), str(tiny_data.code)]
    assert [each.epochs for each in planned] == pytest.approx(seen / windows)


def test_epochs_continue_when_the_order_changes(tiny_data: TinyData) -> None:
    """Shorter windows cut what is left of the epoch; a new epoch gives it up."""
    order = DataOrder.begin(7, SamplingSettings(4, (1.0,), 64, (100,)))
    assert order.num_epochs(10) == [0.4]
    shorter = order.change(10, SamplingSettings(4, (1.0,), 32, (200,)))
    assert shorter.num_epochs(10) == [pytest.approx(0.4)]
    assert shorter.num_epochs(20) == [pytest.approx(0.6)]
    assert shorter.num_epochs(40) == [pytest.approx(1.0)]
    anew = order.change(10, SamplingSettings(4, (1.0,), 64, (100,), num_new_epochs=1))
    assert anew.num_epochs(11) == [pytest.approx(1.04)]
    (found,) = epochs_of(order, 250, [open_dataset(tiny_data.prose)])
    assert found == Epochs(str(tiny_data.prose), 10.0)


def test_more_than_four_epochs_are_warned_of(tiny_data: TinyData) -> None:
    assert Epochs("data/code", 4.0).warning is None
    assert str(Epochs("data/code", 9.31).warning).startswith("data/code is seen 9.3 times in train.steps")


def test_a_config_without_its_data_has_no_epochs(tiny_data: TinyData, tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "s3://nowhere/none"):
        config = tiny_config(tiny_data, tmp_path)
        config["data"]["train"][1]["path"] = path
        assert planned_epochs(RunConfig.model_validate(config)) == []

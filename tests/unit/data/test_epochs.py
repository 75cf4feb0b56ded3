"""How often a run sees its datasets: as its samples say, and told where it is too often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatrain.config import RunConfig
from megatrain.data import open_dataset
from megatrain.data.epochs import Epochs, epochs_of, num_steps, with_default_warmup
from megatrain.data.order import DataOrder, SamplingSettings
from megatrain.data.packing import open_plan, store_plan
from megatrain.errors import ConfigError
from megatrain.train import preview
from tests.runs import TinyData, tiny_config


def test_planned_epochs_match_the_samples_seen(tiny_data: TinyData) -> None:
    config = RunConfig.model_validate(tiny_config(tiny_data, Path("run"), train={"steps": 300}))
    windows = [(open_dataset(path).num_tokens - 1) // 64 for path in (tiny_data.prose, tiny_data.code)]
    order = DataOrder.begin(7, SamplingSettings(8, (2.0, 1.0), 64, tuple(windows)))
    seen = np.bincount(np.concatenate([order.batch(step).dataset for step in range(300)]))
    length = preview.length(config)
    assert length is not None
    assert length.num_steps == 300
    planned = length.epochs
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
    assert str(Epochs("data/code", 9.31).warning).startswith("data/code is seen 9.3 times: text")


def test_a_config_without_its_data_has_no_epochs(tiny_data: TinyData, tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "s3://nowhere/none"):
        config = tiny_config(tiny_data, tmp_path)
        config["data"]["train"][1]["path"] = path
        assert preview.length(RunConfig.model_validate(config)) is None


def by_epochs(data: TinyData, epochs: float, batch: object = 8, **sections: object) -> RunConfig:
    config = tiny_config(data, Path("run"))
    config["train"] = {"epochs": epochs, "global_batch_size": batch}
    config["data"]["train"] = [{"path": str(data.prose)}]
    config["schedule"] = {}
    return RunConfig.model_validate(config | sections)


@pytest.mark.parametrize("batch", [8, [[0, 4], [2000, 8]]], ids=str)
def test_epochs_of_a_run_show_every_sample(tiny_data: TinyData, batch: object) -> None:
    """Each as often as there are epochs; what fills up the last batch is the next epoch's beginning."""
    config = by_epochs(tiny_data, 3.0, batch)
    order = DataOrder.begin(7, SamplingSettings(config.train.global_batch_size, (1.0,), 64, (101,)))
    steps = num_steps(config, order)
    seen = np.concatenate([order.batch(step).index for step in range(steps)])
    counts = np.bincount(seen, minlength=101)
    assert counts.min() == 3
    assert len(seen) - 3 * 101 == np.count_nonzero(counts == 4) < 8
    assert order.num_epochs(steps - 1)[0] < 3.0 <= order.num_epochs(steps)[0]


def test_more_epochs_go_on_in_the_same_order(tiny_data: TinyData) -> None:
    """The order does not depend on where a run is to end; a batch size that changed on the way is counted in."""
    order = DataOrder.begin(7, SamplingSettings(8, (1.0,), 64, (100,)))
    steps = [num_steps(by_epochs(tiny_data, epochs), order) for epochs in (0.5, 1.0, 2.0)]
    assert steps == [7, 13, 25]
    assert num_steps(by_epochs(tiny_data, 2.0), order.change(5, SamplingSettings(16, (1.0,), 64, (100,)))) == 15


def test_epochs_of_a_mixture_are_its_firsts(tiny_data: TinyData) -> None:
    order = DataOrder.begin(7, SamplingSettings(8, (1.0, 3.0), 64, (100, 1000)))
    steps = num_steps(by_epochs(tiny_data, 1.0), order)
    assert (steps, order.num_epochs(steps)) == (50, [1.0, pytest.approx(0.3)])


def test_what_epochs_cannot_hold_is_refused(tiny_data: TinyData) -> None:
    tiny = DataOrder.begin(7, SamplingSettings(64, (1.0,), 64, (10,)))
    with pytest.raises(ConfigError, match=r"train.epochs: 1.0 given; the last step goes through data.train.0 again"):
        num_steps(by_epochs(tiny_data, 1.0), tiny)
    order = DataOrder.begin(7, SamplingSettings(8, (1.0,), 64, (100,)))
    short = by_epochs(tiny_data, 1.0)
    assert with_default_warmup(short, num_steps(short, order)).schedule.warmup_steps == 13
    with pytest.raises(ConfigError, match=r"warmup_steps: 14 given; must be at most the steps of train.epochs=1 \(13"):
        num_steps(by_epochs(tiny_data, 1.0, schedule={"warmup_steps": 14}), order)


def test_packed_samples_are_counted_before_they_are_packed(tiny_data: TinyData, tmp_path: Path) -> None:
    config = by_epochs(tiny_data, 2.0)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": "best_fit"})})
    dataset = open_dataset(tiny_data.prose)
    store_plan(dataset, 64, tmp_path)
    length = preview.length(config)
    assert length is not None
    assert length.num_steps == -(-2 * open_plan(dataset, 64, tmp_path).num_samples // 8)

"""What an optimizer could do to the wrong weights without a word: let them decay, scale their steps, average them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.config import RunConfig
from megatrain.families import FAMILIES
from megatrain.families.description import WeightKind
from megatrain.train.schedule import learning_rate
from tests.parity.figures import Figures, Pool, gather_state
from tests.parity.matrix import parity_config
from tests.parity.saves import write_manifest

slow = [pytest.mark.slow, pytest.mark.acceptance]
LR, DECAY = 1.0e-2, 4.0
ONE_STEP = 1.0 - LR * DECAY
EMA_DECAY = 0.4  # reached after the fifth update: (1 + 5) / (10 + 5)
NUM_STEPS = 6
State = dict[tuple[str, str], torch.Tensor]
NONE_BUT_MATRICES: tuple[WeightKind, ...] = ("norms", "biases", "positions", "embeddings")


def first_step(pool: Pool, num_ranks: int, parallel: dict[str, Any], **optimizer: Any) -> Figures:
    sections: dict[str, Any] = {"optimizer": {"lr": LR, **optimizer}, "schedule": {"warmup_steps": 0}}
    return pool.train(num_ranks, parity_config(pool.data, "gpt2_tied", parallel=parallel, **sections), 1)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (1, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 3}),
        (2, {"engine": "fsdp2", "zero_stage": 1}),
        (2, {"pipeline": 2, "zero_stage": 1}),
        pytest.param(2, {"zero_stage": 2}, marks=slow),
        pytest.param(2, {"zero_stage": 2, "offload": "optimizer"}, marks=slow),
        pytest.param(2, {"zero_stage": 0}, marks=slow),
        pytest.param(2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=slow),
        pytest.param(4, {"engine": "fsdp2", "tensor": 2, "sequence": True}, marks=slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [("norms", "biases", "positions"), NONE_BUT_MATRICES, ()], ids=str)
def test_only_the_kinds_that_should_decay(
    kept: tuple[WeightKind, ...], num_ranks: int, parallel: dict[str, Any], pool: Pool
) -> None:
    """In the first step decay takes its share of the initial weight; what the gradient does is not changed by it."""
    before = pool.alone("gpt2_tied", 0).weights
    plain = first_step(pool, num_ranks, parallel, weight_decay=0.0).weights
    decayed = first_step(pool, num_ranks, parallel, weight_decay=DECAY, no_weight_decay=list(kept)).weights
    assert decayed.keys() == plain.keys()
    for name, weight in decayed.items():
        if FAMILIES["gpt2"].kind_of(name) in kept:
            torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-6, msg=name)
        else:
            torch.testing.assert_close(weight - plain[name], (ONE_STEP - 1.0) * before[name], rtol=1e-3, atol=1e-6)


def averaged(pool: Pool, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"optimizer": {"lr": 3.0e-3, "ema_decay": EMA_DECAY}, "train": train}
    return parity_config(pool.data, "llama_tied", parallel=parallel, **sections)


def state_after(pool: Pool, num_ranks: int, config: dict[str, Any], folder: Path, **case: Any) -> State:
    """What the ranks of a case save; the folder becomes a checkpoint."""
    pool.answer(num_ranks, {"config": config, "save": str(folder), **case})
    write_manifest(folder, config, case.get("first_step", 0) + case["num_steps"])
    return gather_state(folder)


SCALED: dict[str, Any] = {"lr": 3.0e-2, "weight_decay": DECAY, "scale_parameter": True}
SCALING = [
    (1, {"zero_stage": 0}),
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 3}),
    (2, {"tensor": 2}),
    (2, {"engine": "fsdp2", "pipeline": 2, "zero_stage": 1}),
    pytest.param(2, {"zero_stage": 0}, marks=slow),
    pytest.param(2, {"zero_stage": 2, "offload": "optimizer"}, marks=slow),
    pytest.param(2, {"zero_stage": 3, "offload": "all"}, marks=slow),
    pytest.param(4, {"tensor": 4, "sequence": True, "zero_stage": 1}, marks=slow),
    pytest.param(4, {"tensor": 2, "pipeline": 2, "zero_stage": 0}, marks=slow),
    pytest.param(4, {"engine": "fsdp2", "tensor": 2, "zero_stage": 3}, marks=slow),
]


def scaled(pool: Pool, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
    return parity_config(pool.data, "llama_tied", parallel=parallel, optimizer=SCALED, train=train)


@pytest.mark.parametrize(("num_ranks", "parallel"), SCALING, ids=str)
def test_steps_are_scaled_by_whole_tensors(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    """A step is made again from the weights before it and the means after it, on one rank each; all are one rank's."""
    config = RunConfig.model_validate(scaled(pool, parallel))
    b1, b2 = config.optimizer.betas
    first = 0 if num_ranks == 1 else 2
    before = state_after(pool, num_ranks, scaled(pool, parallel), tmp_path / "before", num_steps=first)
    for n in range(first + 1, 4):
        state = state_after(pool, num_ranks, scaled(pool, parallel), tmp_path / str(n), num_steps=n)
        lr = learning_rate(config.schedule, config.optimizer.lr, n - 1, config.train.steps)
        for name in {name for name, _ in state}:
            weight = before[name, "weight"].double()
            mean, square = (state[name, kind].double() for kind in ("exp_avg", "exp_avg_sq"))
            adam = mean / (1 - b1**n) / ((square / (1 - b2**n)).sqrt() + config.optimizer.eps)
            decays = config.optimizer.decays(FAMILIES["llama"].kind_of(name))
            expected = weight * (1 - lr * DECAY * decays) - lr * max(1e-3, float(weight.square().mean().sqrt())) * adam
            torch.testing.assert_close(state[name, "weight"].double(), expected, rtol=1e-6, atol=1e-7, msg=name)
        before = state
    alone = pool.alone("llama_tied", 3, optimizer=SCALED).weights
    far = [name for name in alone if not torch.allclose(before[name, "weight"], alone[name], rtol=1e-4, atol=1e-5)]
    assert far == []


@pytest.mark.parametrize(
    ("source", "target", "train"),
    [
        ((2, {"zero_stage": 3}), (2, {"tensor": 2, "zero_stage": 0}), {}),
        ((2, {"engine": "fsdp2", "zero_stage": 1}), (2, {"zero_stage": 1}), {"precision": "bf16"}),
        pytest.param((4, {"engine": "fsdp2", "tensor": 2, "zero_stage": 2}), (2, {"pipeline": 2}), {}, marks=slow),
    ],
    ids=str,
)
def test_scaled_steps_go_on_under_another_layout(
    source: tuple[int, Any], target: tuple[int, Any], train: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    num_ranks, parallel = source
    config = scaled(pool, parallel, **train)
    whole = state_after(pool, num_ranks, config, tmp_path / "whole", num_steps=5)
    saved = state_after(pool, num_ranks, config, tmp_path / "saved", num_steps=3)
    resumed = {"load": str(tmp_path / "saved"), "first_step": 3, "num_updates": 3}
    assert_same(state_after(pool, num_ranks, config, tmp_path / "again", num_steps=2, **resumed), whole)
    other = scaled(pool, target[1], **train)
    assert_same(state_after(pool, target[0], other, tmp_path / "other", num_steps=0, **resumed), saved)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_a_skipped_update_leaves_scaled_weights(engine: str, pool: Pool, tmp_path: Path) -> None:
    config = scaled(pool, {"engine": engine, "zero_stage": 1})
    before = state_after(pool, 2, config, tmp_path / "before", num_steps=2)
    for case in ({"poisoned_step": 2}, {"refused_step": 2}):
        after = state_after(pool, 2, config, tmp_path / next(iter(case)), num_steps=3, **case)
        assert_same(after, before)


AVERAGING = [
    (2, {"zero_stage": 1}),
    (2, {"zero_stage": 3}),
    (2, {"engine": "fsdp2", "zero_stage": 1}),
    pytest.param(1, {"zero_stage": 0}, marks=slow),
    pytest.param(2, {"zero_stage": 0}, marks=slow),
    pytest.param(2, {"zero_stage": 2, "offload": "optimizer"}, marks=slow),
    pytest.param(2, {"zero_stage": 3, "offload": "all"}, marks=slow),
    pytest.param(4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
    pytest.param(4, {"engine": "fsdp2", "tensor": 2, "pipeline": 2, "zero_stage": 3}, marks=slow),
]


@pytest.mark.parametrize(("num_ranks", "parallel"), AVERAGING, ids=str)
def test_weights_are_averaged_as_one_process_would(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    """The average is made again from the weights after each step of one rank, by its formula."""
    optimizer = {"lr": 3.0e-3}
    weights = [pool.alone("llama_tied", steps, optimizer=optimizer).weights for steps in range(NUM_STEPS + 1)]
    state = state_after(pool, num_ranks, averaged(pool, parallel), tmp_path / "saved", num_steps=NUM_STEPS)
    assert {kind for _, kind in state} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for name, first in weights[0].items():
        average = first.double()
        for n in range(1, NUM_STEPS + 1):
            decay = min(EMA_DECAY, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * weights[n][name].double()
        found = state[name, "ema"].double()
        assert (found - average).norm() < 1e-4 * average.norm(), name
        assert (found - weights[-1][name].double()).norm() > 1e-4 * average.norm(), name


@pytest.mark.parametrize(
    ("source", "target", "train"),
    [
        ((2, {"zero_stage": 1}), (2, {"engine": "fsdp2", "zero_stage": 1}), {}),
        ((2, {"zero_stage": 3}), (2, {"zero_stage": 1}), {"precision": "bf16"}),
        pytest.param((4, {"engine": "fsdp2", "tensor": 2, "zero_stage": 2}), (2, {"pipeline": 2}), {}, marks=slow),
        pytest.param((2, {"tensor": 2}), (2, {"zero_stage": 2, "offload": "optimizer"}), {}, marks=slow),
    ],
    ids=str,
)
def test_an_average_goes_on_under_another_layout(
    source: tuple[int, Any], target: tuple[int, Any], train: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    num_ranks, parallel = source
    config = averaged(pool, parallel, **train)
    whole = state_after(pool, num_ranks, config, tmp_path / "whole", num_steps=5)
    saved = state_after(pool, num_ranks, config, tmp_path / "saved", num_steps=3)
    resumed = {"load": str(tmp_path / "saved"), "first_step": 3, "num_updates": 3}
    again = state_after(pool, num_ranks, config, tmp_path / "again", num_steps=2, **resumed)
    assert_same(again, whole)
    num_others, other = target[0], averaged(pool, target[1], **train)
    assert_same(state_after(pool, num_others, other, tmp_path / "other", num_steps=0, **resumed), saved)


def assert_same(one: State, other: State) -> None:
    """All equal to the last bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_a_skipped_update_leaves_the_average(engine: str, pool: Pool, tmp_path: Path) -> None:
    config = averaged(pool, {"engine": engine, "zero_stage": 1})
    before = state_after(pool, 2, config, tmp_path / "before", num_steps=2)
    for case in ({"poisoned_step": 2}, {"refused_step": 2}):
        after = state_after(pool, 2, config, tmp_path / next(iter(case)), num_steps=3, **case)
        assert_same(after, before)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_an_average_begins_where_none_was_kept(engine: str, pool: Pool, tmp_path: Path) -> None:
    """It begins with the weights of the resume; and with the initial ones where a run goes back to its beginning."""
    config = averaged(pool, {"engine": engine, "zero_stage": 1})
    plain = {**config, "optimizer": {"lr": 3.0e-3}}
    saved = state_after(pool, 2, plain, tmp_path / "saved", num_steps=3)
    assert "ema" not in {kind for _, kind in saved}
    resumed = {"load": str(tmp_path / "saved"), "first_step": 3, "num_updates": 3}
    begun = state_after(pool, 2, config, tmp_path / "begun", num_steps=0, **resumed)
    names = [name for name, kind in begun if kind == "weight"]
    assert [name for name in names if not torch.equal(begun[name, "ema"], saved[name, "weight"])] == []
    straight = state_after(pool, 2, config, tmp_path / "straight", num_steps=4)
    twice = state_after(pool, 2, config, tmp_path / "twice", num_steps=4, twice=True)
    assert_same(twice, straight)

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatrain.config import RunConfig
from megatrain.data.order import DataOrder, Terms
from megatrain.errors import CheckpointError
from megatrain.train.progress import Progress, refuse_changes

TERMS = Terms(8, (2.0, 1.0), 256, (100, 50))
ORDER = DataOrder.begin(3, TERMS)
SHORTER = replace(TERMS, global_batch_size=4, seq_len=64, num_windows=(400, 200))
PROGRESS = Progress(10, 5120, 9, 1, ORDER.change(10, SHORTER).segments, ("a", "b"), {"cur_scale": 2.0**16})
CONFIG = RunConfig.model_validate(
    {
        "run": {"dir": "runs/x"},
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
        "data": {"train": [{"path": "data/a"}]},
        "train": {"steps": 100},
    }
)


def test_it_comes_back_from_a_manifest_as_it_was() -> None:
    state = json.loads(json.dumps(PROGRESS.to_state()))
    assert Progress.from_state(10, 5120, state) == PROGRESS


@pytest.mark.parametrize("key", ["updates", "skipped", "segments", "digests", "loss_scale"])
def test_a_state_that_lacks_something_is_refused(key: str) -> None:
    state = PROGRESS.to_state()
    del state[key]
    with pytest.raises(CheckpointError, match="checkpoint of step 10 cannot be read"):
        Progress.from_state(10, 5120, state)


def test_a_skipped_step_counts_as_a_step_but_not_as_an_update() -> None:
    after = PROGRESS.after_step(512, skipped=True).after_step(512, skipped=False)
    assert (after.step, after.tokens, after.updates, after.skipped) == (12, 6144, 10, 2)


def test_what_may_change_is_not_refused() -> None:
    saved = json.loads(CONFIG.model_dump_json())
    free = CONFIG.model_copy(
        update={
            "train": CONFIG.train.model_copy(update={"steps": 200, "global_batch_size": 32, "precision": "fp32"}),
            "parallel": CONFIG.parallel.model_copy(update={"zero_stage": 3, "recompute": "full"}),
            "optimizer": CONFIG.optimizer.model_copy(update={"lr": 0.1}),
        }
    )
    refuse_changes(free, saved)


def test_all_that_may_not_change_is_named_at_once_with_old_and_new_and_why() -> None:
    saved = json.loads(CONFIG.model_dump_json())
    model = CONFIG.model.model_copy(update={"num_hidden_layers": 3, "rope_theta": 5.0e5})
    changed = CONFIG.model_copy(update={"model": model, "run": CONFIG.run.model_copy(update={"seed": 1})})
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(changed, saved)
    message = str(refused.value)
    assert "model.num_hidden_layers was 2 and is now 3 (another model has no use for these weights)" in message
    assert "model.rope_theta was 10000.0 and is now 500000.0" in message
    assert "run.seed was 1234 and is now 1" in message
    assert "runs/x" in message


def test_segments_survive_a_second_change() -> None:
    first = replace(ORDER, segments=PROGRESS.segments)
    second = first.change(20, replace(SHORTER, weights=(1.0, 0.0)))
    assert [segment.first_step for segment in second.segments] == [0, 10, 20]
    assert second.num_samples_before(20) == 10 * 8 + 10 * 4

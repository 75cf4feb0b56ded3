from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatrain.config import RunConfig
from megatrain.config.keys import leaves
from megatrain.data.order import DataOrder, SamplingSettings
from megatrain.errors import CheckpointError
from megatrain.train.progress import (
    RULES,
    Progress,
    former_config,
    refuse_changes,
    refuse_what_is_left_out,
    resume_order,
    resume_table,
    rule_of,
)
from megatrain.train.spikes import Recent, Rewind

SETTINGS = SamplingSettings(8, (2.0, 1.0), 256, (100, 50))
ORDER = DataOrder.begin(3, SETTINGS)
SHORTER = replace(SETTINGS, global_batch_size=4, seq_len=64, num_samples=(400, 200))
RECENT = Recent((2.5, 2.25), (1.0, 0.5))
PROGRESS = Progress(
    10,
    5120,
    9,
    1,
    ORDER.change(10, SHORTER).segments,
    ("a", "b"),
    {"cur_scale": 2.0**16},
    recent=RECENT,
    rewinds=(Rewind(9, 4, 12, "loss 9"),),
)
CONFIG = RunConfig.model_validate(
    {
        "run": {"dir": "runs/x"},
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
        "data": {"train": [{"path": "data/a"}], "seq_len": 256},
        "train": {"steps": 100, "global_batch_size": 16},
        "optimizer": {"lr": 1.0e-3},
    }
)


def test_progress_survives_the_manifest() -> None:
    state = json.loads(json.dumps(PROGRESS.to_state()))
    assert Progress.from_state(10, 5120, state) == PROGRESS


@pytest.mark.parametrize("key", ["updates", "skipped", "segments", "digests", "loss_scale", "recent", "rewinds"])
def test_a_state_that_lacks_something_is_refused(key: str) -> None:
    state = PROGRESS.to_state()
    del state[key]
    with pytest.raises(CheckpointError, match="checkpoint of step 10 cannot be read"):
        Progress.from_state(10, 5120, state)


@pytest.mark.parametrize(
    ("key", "value"), [("training_seconds", "x"), ("segments", 1), ("recent", []), ("digests", None)]
)
def test_a_state_of_another_kind_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="checkpoint of step 10 cannot be read"):
        Progress.from_state(10, 5120, {**PROGRESS.to_state(), key: value})


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        ({}, "config.run: "),
        ({"model": {}, "data": {"seq_len": 4, "document_mask": False}, "train": {"precision": "bf16"}}, "config.run: "),
        ({"data": None}, "config.data: "),
        ({"experts": {"count": 8}}, "config.experts: "),
    ],
    ids=["nothing", "an imported model", "no data", "a section of a later version"],
)
def test_an_unreadable_config_is_refused_by_key(saved: dict[str, Any], key: str) -> None:
    saved = saved if "run" in key else {**SAVED, **saved}
    with pytest.raises(CheckpointError, match=f"goes on from: {key}.*Use the version that wrote it"):
        refuse_changes(CONFIG, saved)


def test_a_config_saved_under_old_names_goes_on() -> None:
    train = {**SAVED["train"], "compare_weights_every_steps": 7}
    del train["check_replica_hash_interval"]
    former = former_config({**SAVED, "train": train})
    assert former.train.check_replica_hash_interval == 7
    given = ["train.compare_weights_every_steps=7"]
    refuse_what_is_left_out(former, CONFIG, given, ["train.check_replica_hash_interval=100"])
    with pytest.raises(CheckpointError, match=r"train\.check_replica_hash_interval was 7 and would be 100"):
        refuse_what_is_left_out(former, CONFIG, given, [])


def test_a_skipped_step_counts_but_is_no_update() -> None:
    skipped = PROGRESS.after_step(512, True, RECENT).after_step(512, True, RECENT)
    assert skipped.skipped_in_a_row == 2
    after = skipped.after_step(512, False, RECENT)
    assert (after.step, after.tokens, after.updates, after.skipped) == (13, 6656, 10, 3)
    assert (after.skipped_in_a_row, after.recent) == (0, RECENT)


def changed(**sections: dict[str, Any]) -> RunConfig:
    """CONFIG with these keys laid over it."""
    now = json.loads(CONFIG.model_dump_json())
    laid_over = {name: {**now[name], **section} for name, section in sections.items()}
    return RunConfig.model_validate({**now, **laid_over})


def test_null_may_become_what_it_stands_for() -> None:
    t5 = {"family": "t5", "num_key_value_heads": None, "tie_word_embeddings": False, "scale_decoder_outputs": False}
    before = changed(model=t5, data={"document_mask": False}, objective={"type": "sequence_to_sequence"})
    saved, length = json.loads(before.model_dump_json()), before.data.seq_len
    now = {**saved, "objective": {**saved["objective"], "target_len": length}}
    refuse_changes(RunConfig.model_validate(now), saved)
    refuse_changes(changed(objective={"type": "next_token"}), SAVED)
    with pytest.raises(CheckpointError, match=r"objective.target_len was None and is now 5"):
        now["objective"]["target_len"] = 5
        refuse_changes(RunConfig.model_validate(now), saved)


SAVED = json.loads(CONFIG.model_dump_json())
OTHER_VALUES = {
    "steps": 200,
    "global_batch_size": 32,
    "precision": "fp32",
    "eval_every_steps": 5,
    "micro_batch_size": 1,
}


def test_what_may_change_is_not_refused() -> None:
    free = changed(
        run={"dir": "runs/moved", "init_from": "other"},
        model={"hidden_dropout": 0.1},
        data={"train": [{"path": "data/moved", "weight": 0.5}], "validation": [{"path": "data/v"}], "seq_len": 64},
        train=OTHER_VALUES,
        parallel={"zero_stage": 3, "recompute": "full"},
        optimizer={"lr": 0.1},
        schedule={"type": "wsd"},
        checkpoint={"keep": 1},
        observe={"tensorboard": False},
    )
    refuse_changes(free, SAVED)


def test_resuming_tolerates_a_deepspeed_key_since_refused() -> None:
    refuse_changes(CONFIG, {**SAVED, "deepspeed": {"wall_clock_breakdown": True}})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"seq_len": 100}, "data.seq_len was 256 and is now 100 (within an epoch it must divide 256)"),
        ({"packing": "best_fit"}, "data.packing was concat and is now best_fit (it decides where samples begin)"),
        (
            {"packing": "best_fit", "seq_len": 128},
            "data.seq_len was 256 and is now 128 (packing best_fit plans an epoch for one length)",
        ),
    ],
)
def test_sample_starts_change_only_in_a_new_epoch(data: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(changed(data=data), SAVED)
    assert words in str(refused.value)
    assert "or set data.num_new_epochs to 1" in str(refused.value)
    refuse_changes(changed(data={**data, "num_new_epochs": 1}), SAVED)
    with pytest.raises(CheckpointError, match=r"set data\.num_new_epochs to 2"):  # it was asked for, and is done
        saved = {**SAVED, "data": {**SAVED["data"], "num_new_epochs": 1}}
        refuse_changes(changed(data={**data, "num_new_epochs": 1}), saved)


def test_new_epochs_are_never_uncounted() -> None:
    saved = {**SAVED, "data": {**SAVED["data"], "num_new_epochs": 2}}
    with pytest.raises(CheckpointError, match=r"data\.num_new_epochs was 2 and is now 1"):
        refuse_changes(changed(data={"num_new_epochs": 1}), saved)


def test_keys_missing_in_old_checkpoints_stand_at_defaults() -> None:
    saved = {**SAVED, "model": {k: v for k, v in SAVED["model"].items() if k != "rope_theta"}}
    refuse_changes(CONFIG, saved)
    with pytest.raises(CheckpointError, match=r"model.rope_theta was 10000.0 and is now 5.0"):
        refuse_changes(changed(model={"rope_theta": 5.0}), saved)


def test_config_keys_and_rules_match() -> None:
    keys = [key for key, _ in leaves()]
    used = {rule_of(key).key for key in keys if key != "data.train"}  # the list itself: its entries have rules
    assert used == {rule.key for rule in RULES}


def test_the_documented_table_is_the_enforced_one() -> None:
    page = Path(__file__).parents[3] / "docs" / "resuming.md"
    assert resume_table() in page.read_text(encoding="utf-8")


class Named(NamedTuple):
    """As much of a dataset as resuming looks at."""

    path: str
    digest: str


def resumed(settings: SamplingSettings, progress: Progress = PROGRESS) -> DataOrder:
    datasets: Any = [Named("data/a", "a"), Named("data/b", "b")]
    return resume_order(CONFIG, progress, datasets, DataOrder.begin(3, settings))


def test_only_changed_terms_begin_a_segment() -> None:
    assert resumed(SHORTER).segments == PROGRESS.segments
    assert [s.first_step for s in resumed(replace(SHORTER, weights=(1.0, 5.0))).segments] == [0, 10]


def test_another_packing_plan_needs_a_new_epoch() -> None:
    packed = replace(SETTINGS, plans=("aa", "bb"))
    progress = replace(PROGRESS, segments=DataOrder.begin(3, packed).segments)
    assert resumed(packed, progress).segments == progress.segments
    other = replace(packed, plans=("aa", "cc"))
    with pytest.raises(CheckpointError, match="packing plan of data/b is not the one") as refused:
        resumed(other, progress)
    assert "set data.num_new_epochs to 1" in str(refused.value)
    assert resumed(replace(other, num_new_epochs=1), progress).settings(10).plans == ("aa", "cc")


def test_all_forbidden_changes_are_explained_at_once() -> None:
    other = changed(model={"num_hidden_layers": 3, "rope_theta": 5.0e5}, run={"seed": 1})
    with pytest.raises(CheckpointError) as refused:
        refuse_changes(other, SAVED)
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


def test_only_a_gain_makes_a_new_best() -> None:
    progress = Progress(0, 0, 0, 0, (), ())
    for loss, best, num_worse in ((math.nan, None, 1), (2.0, 2.0, 0), (1.95, 2.0, 1), (1.8, 1.8, 0), (1.8, 1.8, 1)):
        progress = progress.after_validation(loss, min_gain=0.1)
        assert (progress.best_validation_loss, progress.num_worse) == (best, num_worse)
    assert Progress.from_state(0, 0, progress.to_state()) == progress

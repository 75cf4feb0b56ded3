"""Keys that had another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.config import load
from megatrain.config.keys import leaves
from megatrain.config.renamed import RENAMED

OLD, NEW = "train.compare_weights_every_steps", "train.check_replica_hash_interval"
TRAIN = "train: {steps: 200, global_batch_size: 16, compare_weights_every_steps: 7}"


def test_old_names_work_in_file_and_override(loaded, with_line):
    assert loaded(text=with_line(TRAIN)).train.check_replica_hash_interval == 7
    assert loaded(f"{OLD}=9").train.check_replica_hash_interval == 9


@pytest.mark.parametrize("key", [OLD, NEW])
def test_an_override_wins_under_either_name(loaded, with_line, key):
    for text in (TRAIN, TRAIN.replace(OLD.rpartition(".")[2], NEW.rpartition(".")[2])):
        assert loaded(f"{key}=null", text=with_line(text)).train.check_replica_hash_interval is None


def test_both_names_in_a_file_are_refused(refused, with_line):
    text = with_line(TRAIN.replace("}", ", check_replica_hash_interval: 7}"))
    message = f"{OLD} (line 5): 7 given; a former name of {NEW}, which is given too; keep one"
    assert message in refused(text=text)


@pytest.mark.parametrize("order", [(OLD, NEW), (NEW, OLD)])
def test_both_names_as_overrides_are_refused(refused, order):
    message = refused(*(f"{key}={value}" for key, value in zip(order, (7, 9), strict=True)))
    assert f"{OLD} (the command line): {7 if order[0] == OLD else 9} given; a former name of {NEW}" in message


def test_a_wrong_value_keeps_its_line(refused, with_line):
    message = refused(text=with_line(TRAIN.replace("7", "0")))
    assert f"{NEW} (line 5): 0 given; must be at least 1" in message


def test_a_former_name_is_noted_once(tmp_path: Path, with_line):
    path, notes = tmp_path / "run.yaml", []
    path.write_text(with_line(TRAIN))
    load(path, [f"{OLD}=9"], note=notes.append)
    assert notes == [f"{OLD} is called {NEW} now; the old name still works."]
    path.write_text(with_line())
    load(path, [f"{NEW}=9"], note=notes.append)
    assert len(notes) == 1


def test_new_names_are_keys_and_old_ones_not():
    keys = {key for key, _ in leaves()}
    assert keys >= set(RENAMED.values())
    assert keys.isdisjoint(RENAMED)
    assert all(old.split(".")[0] == new.split(".")[0] for old, new in RENAMED.items())

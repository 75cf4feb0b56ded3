from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_samples import manifest, write_checkpoint

from megatrain.checkpoint.store import CheckpointStore, resolve
from megatrain.errors import CheckpointError


def _steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.step for checkpoint in store.list()]


def test_nothing_is_visible_before_the_commit_and_nothing_hidden_after_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(5)
    assert store.list() == []
    assert store.newest_good() is None
    store.commit(manifest(5, []))
    assert _steps(store) == [5]
    assert [path.name for path in store.folder.iterdir()] == ["step-00000005"]


def test_the_newest_good_one_skips_what_is_cut_off_or_missing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    (store.finished(4) / "rank-00001.safetensors").unlink()
    (store.finished(3) / "tokenizer.json").write_bytes(b"")
    newest = store.newest_good()
    assert newest is not None
    assert newest.step == 2
    again = store.newest_good({store.finished(2): "found damaged"})
    assert again is not None
    assert again.step == 1


def test_where_none_is_good_the_newest_ones_fault_is_told(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    (store.finished(1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 checkpoint\(s\), and none is good; the newest: bytes 1 to 2 of x"):
        store.newest_good({store.finished(2): "bytes 1 to 2 of x"})


def test_pruning_keeps_the_newest_good_ones_and_what_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    (store.finished(4) / "tokenizer.json").write_bytes(b"")
    store.prune(keep=2, last_step=6)
    assert _steps(store) == [4, 5, 6]


def test_pruning_after_going_back_does_not_count_the_later_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 9):
        write_checkpoint(tmp_path, step)
    store.prune(keep=1, last_step=2)
    assert _steps(store) == [2, 9]


def test_a_save_over_a_checkpoint_of_the_same_step_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write_checkpoint(tmp_path, 1, num_ranks=3)
    write_checkpoint(tmp_path, 1, num_ranks=1)
    assert sorted(path.name for path in store.finished(1).iterdir()) == [
        "manifest.json",
        "rank-00000.safetensors",
        "tokenizer.json",
    ]


def test_cleaning_removes_what_killed_saves_and_deletions_left_and_no_more(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write_checkpoint(tmp_path, 1)
    store.begin(2)
    shutil.copytree(store.finished(1), store.folder / ".deleted-step-00000000")
    (store.folder / "notes").mkdir()
    store.clean()
    assert sorted(path.name for path in store.folder.iterdir()) == ["notes", "step-00000001"]


def test_a_run_folder_a_checkpoints_folder_and_a_checkpoint_all_name_a_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    assert resolve(tmp_path) == resolve(tmp_path / "checkpoints") == resolve(folder) == folder


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=name):
        resolve(tmp_path / name)

"""A run's checkpoints: the same promises on a POSIX disk and in an object store (a real S3-compatible server)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoint_samples import fragments, manifest, save, write_checkpoint
from upath import UPath

from megatrain.checkpoint.inspection import rewind, verify
from megatrain.checkpoint.location import Location
from megatrain.checkpoint.lock import locked
from megatrain.checkpoint.rank_file import write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import CheckpointStore, PosixStore, Retention, find_problem
from megatrain.checkpoint.stores import find_store, open_store, resolve
from megatrain.errors import CheckpointError, Superseded
from tests.faults.small_disk import small_disk


@pytest.fixture(params=["posix", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Where a run's checkpoints lie."""
    if request.param == "posix":
        return tmp_path / "checkpoints"
    bucket: str = request.getfixturevalue("bucket")
    return UPath(bucket) / tmp_path.name


def _open(place: Location) -> CheckpointStore:
    return open_store(Path("unused"), str(place))


def _steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.step for checkpoint in store.list()]


def test_nothing_is_visible_before_the_commit(place: Location) -> None:
    store = _open(place)
    store.open_generation()
    folder = store.begin(5)
    write_rank_file(folder / "rank-00000.safetensors", fragments(0, 2))
    assert _steps(_open(place)) == []
    assert store.newest_good() is None
    store.commit(manifest(5, []))
    assert _steps(_open(place)) == [5]


def test_a_saved_checkpoint_reads_back_whole(place: Location) -> None:
    store = _open(place)
    path = save(store, 7)
    assert resolve(place) == path
    assert verify(place) == ([], 3, sum(entry.bytes for entry in CheckpointReader(path).manifest.files))
    for fragment in fragments(1, 3):  # another number of ranks than wrote it
        assert CheckpointReader(path).read(fragment.shard, fragment.kind).equal(fragment.data)


def test_a_flipped_bit_is_found_and_named(place: Location) -> None:
    path = save(_open(place), 7) / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4  # in the data, before the digest of its block
    path.write_bytes(bytes(content))
    problems, _, _ = verify(place)
    assert len(problems) == 1
    assert "rank-00001.safetensors: bytes" in problems[0]


def test_a_later_start_fences_the_earlier_one(place: Location) -> None:
    late, earlier = _open(place), _open(place)
    save(earlier, 10)
    late.join(earlier.generation)
    write_rank_file(late.begin(20) / "rank-00000.safetensors", fragments(0, 1))
    successor = _open(place)
    successor.open_generation()
    with pytest.raises(Superseded):
        late.refuse_if_superseded()
    with pytest.raises((Superseded, FileNotFoundError)):
        late.commit(manifest(20, []))
    assert _steps(_open(place)) == [10]
    save(successor, 20)
    with pytest.raises((Superseded, FileNotFoundError)):  # even now that a checkpoint of that step stands there
        late.commit(manifest(20, []))
    assert _steps(_open(place)) == [10, 20]
    assert verify(place)[0] == []


def test_a_start_removes_unfinished_saves_before_it(place: Location) -> None:
    killed = _open(place)
    save(killed, 1)
    write_rank_file(killed.begin(2) / "rank-00000.safetensors", fragments(0, 1))
    store = _open(place)
    store.open_generation()
    left = [path for path in place.rglob("*") if "00000002" in str(path)]
    assert left == []
    assert _steps(store) == [1]


def test_rewinding_moves_later_checkpoints_and_loses_none(place: Location) -> None:
    store = _open(place)
    for step in (1, 2, 3):
        save(store, step)
    taken = store.set_aside(1)
    assert [found.step for found in taken] == [3, 2]
    assert _steps(_open(place)) == [1]
    for found in taken:
        assert CheckpointReader(found.path).manifest.step == found.step
    save(store, 2)  # the run comes to that step again
    assert _steps(_open(place)) == [1, 2]
    for _ in range(2):  # nor does a later start remove what was set aside
        _open(place).open_generation()
        assert [CheckpointReader(found.path).manifest.step for found in taken] == [3, 2]
    assert _steps(_open(place)) == [1, 2]


def test_pruning_keeps_newest_nth_best_and_requested(place: Location) -> None:
    store = _open(place)
    losses = {1: 3.0, 2: None, 3: 2.0, 4: 2.5, 5: None, 6: 2.2, 7: 2.3, 8: None}
    for step, loss in losses.items():
        save(store, step, num_ranks=1, validation_loss=loss, on_request=step == 2)
    store.prune(Retention(last=2, every_steps=5, best=1))
    assert _steps(store) == [2, 3, 5, 7, 8]


def test_the_newest_good_one_skips_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    store = PosixStore(tmp_path / "checkpoints")
    (store.find(4) / "rank-00001.safetensors").unlink()
    (store.find(3) / "tokenizer.json").write_bytes(b"")
    newest = store.newest_good()
    assert newest is not None
    assert newest.step == 2
    again = store.newest_good({store.find(2): "found damaged"})
    assert again is not None
    assert again.step == 1


def test_a_vanished_checkpoint_is_reported_missing(place: Location) -> None:
    gone = save(_open(place), 1).with_name("step-00000002.g00001-0badcafe")
    assert str(gone) in (find_problem(gone) or "")


def test_without_a_good_checkpoint_the_newest_is_explained(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    store = PosixStore(tmp_path / "checkpoints")
    (store.find(1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 checkpoint\(s\), and none is good; the newest: bytes 1 to 2 of x"):
        store.newest_good({store.find(2): "bytes 1 to 2 of x"})


def test_pruning_keeps_what_is_damaged(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, step)
    store = PosixStore(tmp_path / "checkpoints")
    (store.find(4) / "tokenizer.json").write_bytes(b"")
    store.prune(Retention(last=2))
    assert _steps(store) == [4, 5, 6]


def test_pruning_never_deletes_the_last_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    store = PosixStore(tmp_path / "checkpoints")
    for step in (2, 3):
        (store.find(step) / "tokenizer.json").write_bytes(b"")
    store.prune(Retention(last=1))
    assert _steps(store) == [1, 2, 3]


def test_a_start_leaves_foreign_files_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    store = PosixStore(tmp_path / "checkpoints")
    shutil.copytree(store.find(1), store.folder / ".deleted-step-00000000")
    (store.folder / "notes").mkdir()
    generation = store.open_generation()
    assert sorted(path.name for path in store.folder.iterdir()) == [generation, "notes", "step-00000001"]


def test_runs_their_checkpoint_folders_and_checkpoints_are_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    assert resolve(tmp_path) == resolve(tmp_path / "checkpoints") == resolve(folder) == folder


def test_a_run_folder_leads_to_its_checkpoint_dir(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path}/elsewhere}}\n")
    store = find_store(run_dir)
    path = save(store, 3)
    assert resolve(run_dir) == resolve(tmp_path / "elsewhere") == path
    assert store.folder == tmp_path / "elsewhere"


def test_a_checkpoint_folder_without_run_can_be_rewound(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "elsewhere")
    save(store, 1)
    save(store, 2)
    assert [found.step for found in rewind(store.folder, 1, {"host": "here"})] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]  # no lock beside it


def test_rewinding_without_a_good_checkpoint_lists_alternatives(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; it has: 10, 20"):
        rewind(tmp_path, 15, {"host": "here"})
    (tmp_path / "checkpoints" / "step-00000010" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"step 10 is not good: .*tokenizer\.json"):
        rewind(tmp_path, 10, {"host": "here"})


@pytest.mark.parametrize("name", ["", "checkpoints"])
@pytest.mark.slow
def test_no_run_is_rewound_while_it_goes_on(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    with locked(tmp_path, {"host": "elsewhere"}), pytest.raises(CheckpointError, match="in use"):
        rewind(tmp_path / name, 10, {"host": "here"})


def test_rewinding_names_an_unwritable_folder(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        for step in (10, 20):
            write_checkpoint(tmp_path, step)
        shutil.copytree(tmp_path / "checkpoints", disk / "checkpoints")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(f"checkpoint: {{dir: {disk}/checkpoints}}\n")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="step-00000020: Read-only file system"):
            rewind(tmp_path / "run", 10, {"host": "here"})


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_checkpoint_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=name):
        resolve(tmp_path / name)

"""A disk that fills up: training goes on, the message says which file and why, and the checkpoint before stays."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.store import PosixStore
from megatrain.checkpoint.stores import find_store
from tests.faults.small_disk import fill, small_disk
from tests.faults.traced_save import begin_save, end_save, save
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks

DISK_BYTES = 1 << 20  # two checkpoints of the tiny model, 440 kB each


@pytest.mark.parametrize("level", range(10))
def test_a_full_disk_during_saving_loses_nothing(level: int, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200_000) as disk:
        store = PosixStore(disk / "checkpoints")
        store.open_generation()
        path = save(store, 1)
        assert path is not None
        needed = sum(-(-file.stat().st_size // 4096) * 4096 for file in path.iterdir())
        ballast = fill(disk, but=needed * level // 10)
        saver = begin_save(store, 2)
        outcome = end_save(saver)
        assert outcome.path is None
        assert "No space left on device" in str(saver.error)
        assert str(disk / "checkpoints") in str(saver.error)
        assert [found.step for found in store.list()] == [1]
        assert verify(disk / "checkpoints")[0] == []
        assert list((disk / "checkpoints" / store.generation).iterdir()) == []
        ballast.unlink()
        assert save(store, 3) is not None


@pytest.mark.slow
def test_saving_succeeds_again_once_there_is_room(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        _check_save_without_room(disk, tiny_data, two_ranks, tmp_path)


def _check_save_without_room(disk: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    run_dir = disk / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, checkpoint={"every_steps": 2}))
    two_ranks.finish(config, "train.steps=2")
    two_ranks.finish(config, "train.steps=8", "checkpoint.keep=1", "checkpoint.background=false")
    ballast = fill(disk, but=200_000)
    ended = two_ranks.train(config, "train.steps=12", "checkpoint.keep=1")
    assert ended.codes == [4, 4]
    spoken = "".join(ended.output)
    assert "No space left on device" in spoken
    assert str(run_dir / "checkpoints") in spoken
    assert "training goes on, the one before stays" in spoken
    assert "after step 12" in spoken
    assert "Traceback" not in spoken
    kept = find_store(run_dir).list()
    assert [checkpoint.step for checkpoint in kept] == [8]
    assert verify(kept[0].path)[0] == []
    assert [list(path.iterdir()) for path in (run_dir / "checkpoints").glob(".*")] == [[]]  # nothing left unfinished
    ballast.unlink()
    two_ranks.finish(config, "train.steps=12", "checkpoint.keep=1")
    assert Metrics.read(run_dir).steps == list(range(1, 13))


def test_all_ranks_tell_why_one_cannot_write(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", checkpoint={"every_steps": 2})
    )
    two_ranks.finish(config, "train.steps=2")
    second = psutil.Process(two_ranks.pids[1])
    before = second.rlimit(psutil.RLIMIT_FSIZE)
    second.rlimit(psutil.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        ended = two_ranks.train(config, "train.steps=6")
    finally:
        second.rlimit(psutil.RLIMIT_FSIZE, before)
    assert ended.codes == [4, 4]
    assert ended.output[0].count("rank-00001.safetensors: File too large); training goes on") == 2
    assert "after step 6" in "".join(ended.output)
    assert "/run/checkpoints: " in "".join(ended.output)
    assert "rank-00001.safetensors: File too large. Make room" in "".join(ended.output)
    two_ranks.finish(config, "train.steps=6")

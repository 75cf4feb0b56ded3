"""A disk that fills up: training goes on, the message says which file and why, and the checkpoint before stays."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.store import find_store
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks

DISK_BYTES = 1 << 20  # two checkpoints of the tiny model, 440 kB each


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if refused.returncode:
        pytest.skip(f"mounting is not permitted here: {refused.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(disk: Path, but: int) -> Path:
    """Leave ``but`` bytes free."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = int(subprocess.run(["df", "--output=avail", "-B1", disk], capture_output=True).stdout.split()[-1])
        file.write(bytes(free - but))
    return ballast


def test_a_save_without_room_is_reported_and_the_next_with_room_succeeds(
    small_disk: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, checkpoint={"every_steps": 2}))
    two_ranks.finish(config, "train.steps=2")
    two_ranks.finish(config, "train.steps=8", "checkpoint.keep=1", "checkpoint.background=false")
    ballast = _fill(small_disk, but=200_000)
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

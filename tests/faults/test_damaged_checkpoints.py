"""What a start makes of damaged checkpoints: the newest good one on all ranks, and never a fresh start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Copy
from tests.runs import Metrics
from tests.served import ServedRanks


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def _middle(path: Path) -> int:
    return path.stat().st_size // 2


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the second rank's file": lambda c: _flip(c / "rank-00001.safetensors", -5000),
    "a bit of the first rank's header": lambda c: _flip(c / "rank-00000.safetensors", 900),
    "a bit of the manifest": lambda c: _flip(c / "manifest.json", _middle(c / "manifest.json")),
    "a file cut off": lambda c: (c / "rank-00001.safetensors").write_bytes(
        (c / "rank-00001.safetensors").read_bytes()[:-7]
    ),
    "an empty file": lambda c: (c / "rank-00000.safetensors").write_bytes(b""),
    "a missing file": lambda c: (c / "rank-00001.safetensors").unlink(),
    "a missing manifest": lambda c: (c / "manifest.json").unlink(),
    "the ranks' files swapped": lambda c: _swap(c / "rank-00000.safetensors", c / "rank-00001.safetensors"),
    "a file of an older checkpoint": lambda c: shutil.copy(
        c.with_name("step-00000002") / "rank-00000.safetensors", c / "rank-00000.safetensors"
    ),
}


def _swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_skip_and_name_a_damaged_checkpoint(
    damage: str, copy_run: Callable[[], Copy], two_ranks: ServedRanks, losses: list[float]
) -> None:
    run = copy_run()
    DAMAGES[damage](run.checkpoint(6))
    ended = two_ranks.train(run.config)
    assert ended.codes == [0, 0], ended.output
    assert "passed over" in ended.output[0]
    assert "step-00000006" in ended.output[0]
    metrics = Metrics.read(run.run_dir)
    assert metrics.steps == [1, 2, 3, 4, 5, 6]
    assert metrics.losses == losses  # steps 5 and 6 were trained again, from step 4
    assert metrics.events[-1]["event"] == "finish"
    assert [event["step"] for event in metrics.events if event["event"] == "resume"] == [4]


def test_without_a_good_checkpoint_it_exits_4(copy_run: Callable[[], Copy], two_ranks: ServedRanks) -> None:
    run = copy_run()
    for step in (2, 4, 6):
        _flip(run.checkpoint(step) / "rank-00001.safetensors", -5000)
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    ended = two_ranks.train(run.config)
    assert ended.codes == [4, 4]
    spoken = "".join(ended.output)
    assert "none is good" in spoken
    assert "rank-00001.safetensors" in spoken
    assert "Traceback" not in spoken
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before
    assert len(list((run.run_dir / "checkpoints").glob("step-*"))) == 3


def test_a_damaged_checkpoint_does_not_displace_good_ones(
    copy_run: Callable[[], Copy], two_ranks: ServedRanks, losses: list[float]
) -> None:
    run = copy_run()
    _flip(run.checkpoint(6) / "rank-00000.safetensors", -5000)
    two_ranks.finish(run.config, "checkpoint.keep=1", "checkpoint.every_steps=5", "train.steps=5")
    assert run.checkpoint(5).is_dir()
    two_ranks.finish(run.config)  # over the damaged one, from step 5
    assert Metrics.read(run.run_dir).losses == losses


def test_what_a_killed_save_left_is_removed(copy_run: Callable[[], Copy], two_ranks: ServedRanks) -> None:
    run = copy_run()
    left = run.run_dir / "checkpoints" / ".generation-00001-0badcafe"
    shutil.copytree(run.checkpoint(6), left / "step-00000007")
    two_ranks.finish(run.config, "train.steps=7")
    assert not left.exists()
    assert [list(path.iterdir()) for path in (run.run_dir / "checkpoints").glob(".*")] == [[]]
    assert run.checkpoint(7).is_dir()

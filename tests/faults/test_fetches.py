"""Figures that are fetched every few steps are those that are fetched after each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.manifest import read_manifest
from megatrain.observe.metrics import read_lines
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

SAME = ("step", "tokens", "loss", "grad_norm", "lr", "skipped")


def _train(tiny_data: TinyData, two_ranks: ServedRanks, run_dir: Path, log_every_steps: int) -> list[dict[str, Any]]:
    sections = {
        "train": {"steps": 8, "precision": "fp16", "initial_loss_scale_power": 24},
        "parallel": {"engine": "fsdp2"},
        "checkpoint": {"every_steps": 5},
        "observe": {"log_every_steps": log_every_steps},
    }
    two_ranks.finish(write_config(run_dir.with_suffix(".yaml"), tiny_config(tiny_data, run_dir, **sections)))
    return list(read_lines(run_dir))


@pytest.mark.slow
def test_rare_fetches_change_no_figure(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    """fp16's scale is too large at first, so that updates are left out, which each is told."""
    each, rare = (_train(tiny_data, two_ranks, tmp_path / f"every-{count}", count) for count in (1, 3))
    every = {line["step"]: {key: line[key] for key in SAME} for line in each if "loss" in line}
    logged = [{key: line[key] for key in SAME} for line in rare if "loss" in line]
    assert logged == [every[step] for step in (3, 6, 8)]
    skips = [[line["step"] for line in lines if line.get("event") == "skipped"] for lines in (each, rare)]
    assert skips[0] == skips[1] != []
    former, latter = (read_manifest(tmp_path / f"every-{count}" / "checkpoints" / "step-00000005") for count in (1, 3))
    assert {**former.state, "training_seconds": 0} == {**latter.state, "training_seconds": 0}
    assert [file.checksum for file in former.files] == [file.checksum for file in latter.files]

"""train.early_stopping: a run ends, its state saved, when evaluations bring no better validation loss."""

from __future__ import annotations

from pathlib import Path

from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks


def test_a_run_without_gain_ends_early(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    sections = {
        "train": {"steps": 20, "eval_every_steps": 2, "eval_batches": 1, "early_stopping": {"patience": 2}},
        "optimizer": {"lr": 0.0},  # so that every evaluation gives the same loss
        "checkpoint": {"every_steps": 5},
    }
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections))
    two_ranks.finish(config)
    metrics = Metrics.read(tmp_path / "run")
    assert metrics.steps[-1] == 6  # a best one after 2 steps, no better ones after 4 and 6
    assert metrics.events[-1]["event"] == "finish"
    assert "ended early" in metrics.events[-1]["message"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").exists()
    two_ranks.finish(config)
    assert Metrics.read(tmp_path / "run").steps == metrics.steps
    two_ranks.finish(config, "train.early_stopping.patience=3")
    assert Metrics.read(tmp_path / "run").steps[-1] == 8

"""Transformed samples in whole runs: the same on one rank and two and after a resume, and never in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks

TRANSFORMS = {"fill_in_the_middle": {"rate": 0.5}, "span_corruption": {"rate": 0.3}, "token_masking": {"rate": 0.1}}


def config_of(data: Path, run_dir: Path, transforms: dict[str, Any], **keys: Any) -> Path:
    sections = tiny_config(TinyData(data, data, data, data / "tokenizer.json"), run_dir)
    sections["data"] |= {"train": [{"path": str(data), **transforms}], **keys}
    return write_config(run_dir.with_suffix(".yaml"), sections)


def validation_losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_transforms_are_alike_on_ranks_and_after_resuming(
    packing: str, sentinel_data: Path, one_rank: ServedRanks, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    runs = {
        name: config_of(
            sentinel_data, tmp_path / name, TRANSFORMS, packing=packing, document_mask=packing == "best_fit"
        )
        for name in ("straight", "paused", "alone")
    }
    two_ranks.finish(runs["straight"], "train.steps=8")
    two_ranks.finish(runs["paused"], "train.steps=3")
    two_ranks.finish(runs["paused"], "train.steps=8")
    one_rank.finish(runs["alone"], "train.steps=8")
    straight, paused, alone = (Metrics.read(tmp_path / name) for name in runs)
    assert (paused.steps, paused.losses, paused.norms) == (straight.steps, straight.losses, straight.norms)
    assert alone.losses == pytest.approx(straight.losses, rel=1e-4)


@pytest.mark.slow
def test_an_evaluation_sees_documents_as_they_are(sentinel_data: Path, one_rank: ServedRanks, tmp_path: Path) -> None:
    """With a learning rate of zero the weights are the same: what is left is what the losses are computed on."""
    for name, transforms in {"plain": {}, "transformed": TRANSFORMS}.items():
        config = config_of(sentinel_data, tmp_path / name, transforms)
        one_rank.finish(config, "train.steps=3", "optimizer.lr=0.0")
    plain, transformed = Metrics.read(tmp_path / "plain"), Metrics.read(tmp_path / "transformed")
    assert plain.losses != pytest.approx(transformed.losses, rel=1e-3)
    assert validation_losses(tmp_path / "plain") == validation_losses(tmp_path / "transformed") != []


@pytest.mark.slow
def test_a_missing_sentinel_is_refused_by_key(sentinel_data: Path, two_ranks: ServedRanks, tmp_path: Path) -> None:
    config = config_of(sentinel_data, tmp_path / "run", {"token_masking": {"mask_token": "<none>"}})
    ended = two_ranks.train(config, "train.steps=2")
    assert ended.codes == [2, 2]
    assert "data.train.0.token_masking.mask_token: <none> given" in "".join(ended.output)
    assert "Traceback" not in "".join(ended.output)

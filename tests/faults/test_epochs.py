"""A run by epochs, on conversations: as long as its data says, and exact where it goes on across their border."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.data import open_dataset
from megatrain.data.packing import make_plan
from megatrain.observe.metrics import last_num_steps
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks
from tests.supervised import make_answers


@pytest.mark.slow
def test_a_run_goes_on_across_epochs_exactly(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    (folder := tmp_path / "data").mkdir()
    pairs = [(f"question {k}: " * (k % 7 + 1), f"answer {k}. " * (k % 4 + 1)) for k in range(60)]
    answers = make_answers(folder, [*pairs, ("too long " * 40, "dropped")], tiny_data.tokenizer)
    run, plan = tmp_path / "run", make_plan(open_dataset(answers), 64)

    def config(run_dir: Path, epochs: float) -> Path:
        sections: dict[str, Any] = tiny_config(tiny_data, run_dir, checkpoint={"every_steps": 3})
        sections["train"] |= {"epochs": epochs, "eval_every_steps": 4}
        del sections["train"]["steps"]
        sections["data"] |= {"train": [str(answers)], "validation": [str(answers)], "packing": "best_fit"}
        sections["data"]["document_mask"] = True
        return write_config(tmp_path / "run.yaml", sections)

    one_rank.finish(config(tmp_path / "whole", 3.0))
    whole = Metrics.read(tmp_path / "whole")
    num_steps = -(-3 * plan.num_samples // 8)
    assert whole.steps == list(range(1, num_steps + 1))
    assert last_num_steps(tmp_path / "whole") == num_steps > 6
    assert "left out" in next(event["message"] for event in whole.events if event["event"] == "packing")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    targets = int(plan.num_targets(np.arange(plan.num_samples)).sum())
    assert 3 * targets <= [line["tokens"] for line in lines if "loss" in line][-1] < 3 * targets + 8 * 64
    for epochs in (1.0, 3.0):  # the first ends in the middle of a batch of the second
        one_rank.finish(config(run, epochs))
    parts = Metrics.read(run)
    assert (parts.steps, parts.losses, parts.norms) == (whole.steps, whole.losses, whole.norms)
    assert [event["changes"]["train.epochs"] for event in parts.events if event["event"] == "resume"] == [[1.0, 3.0]]

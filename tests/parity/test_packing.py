"""Best-fit packing, whose samples have different numbers of targets: the same training on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.location import locate
from megatrain.data import open_dataset
from megatrain.train.evaluation import evaluate_checkpoint
from tests.parity.figures import Pool
from tests.parity.matrix import parity_config
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks


def config(pool: Pool, run_dir: Path, packing: str, document_mask: bool, **parallel: int) -> dict[str, Any]:
    sections = parity_config(pool.data, "llama", parallel=parallel)
    sections["run"] |= {"dir": str(run_dir)}
    sections["data"] |= {"packing": packing, "document_mask": document_mask, "seq_len": 64}
    return sections


@pytest.mark.parametrize("document_mask", [False, True])
def test_packed_documents_train_alike_on_two_ranks(document_mask: bool, pool: Pool, tmp_path: Path) -> None:
    two, one = (pool.train(n, config(pool, tmp_path, "best_fit", document_mask)) for n in (2, 1))
    two.assert_equals(one)
    assert len(list((tmp_path / "packing").iterdir())) == 2, "a plan for each dataset, and nothing else"
    assert two.losses != pool.train(1, config(pool, tmp_path, "concat", document_mask)).losses


def test_packed_documents_train_the_same_through_a_pipeline(pool: Pool, tmp_path: Path) -> None:
    two = pool.train(2, config(pool, tmp_path, "best_fit", True, pipeline=2))
    two.assert_equals(pool.train(1, config(pool, tmp_path, "best_fit", True)))


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"pipeline": 2}], ids=str)
def test_two_ranks_leave_out_the_same_targets(parallel: dict[str, int], pool: Pool, short_documents: Path) -> None:
    data: dict[str, Any] = {"train": [{"path": str(short_documents)}], "document_mask": True, "score_after_eod": False}
    two = pool.train(2, parity_config(pool.data, "llama", data=data, parallel=parallel), 4)
    two.assert_equals(pool.alone("llama", 4, data=data))
    every = pool.train(2, parity_config(pool.data, "llama", data={**data, "score_after_eod": True}), 4)
    assert abs(two.validation - every.validation) > 1e-3


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, {"score_after_eod": False}, {"packing": "best_fit"}], ids=str)
def test_training_validation_and_eval_score_the_same_targets(
    sections: dict[str, Any], tiny_data: TinyData, short_documents: Path, one_rank: ServedRanks, tmp_path: Path
) -> None:
    """Nothing is learned, and a step is an epoch of the very documents that are evaluated."""
    paths = {name: [{"path": str(short_documents)}] for name in ("train", "validation")}
    dataset = open_dataset(short_documents)
    num_windows = (dataset.num_tokens - 1) // 64
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        train={"steps": 1, "global_batch_size": num_windows, "micro_batch_size": num_windows, "eval_batches": None},
        optimizer={"lr": 0.0},
        schedule={"warmup_steps": 0},
    )
    config["data"] |= {**paths, **sections}
    one_rank.finish(write_config(tmp_path / "run.yaml", config))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if "loss" in line)
    (validation,) = (line for line in lines if "validation_loss" in line)
    computing = step["step_seconds"] - step["parts"]["eval"] - step["parts"].get("save", 0.0)
    assert step["tokens_per_second"] * computing == pytest.approx(step["tokens"]), "filling is counted"
    found = evaluate_checkpoint(locate(str(tmp_path / "run")), short_documents, show_progress=False)
    assert found["loss"] == pytest.approx(validation["validation_loss"], rel=1e-5)
    assert validation["validation_losses"] == {"set": validation["validation_loss"]}
    begun = len(dataset.document_starts(1, num_windows * 64)) if sections else 0
    assert found["tokens"] == num_windows * 64 - begun
    if "packing" not in sections:
        assert step["tokens"] == found["tokens"]
        assert step["loss"] == pytest.approx(validation["validation_loss"], rel=1e-5)
    firsts = dataset.token_bytes[[dataset.document(k)[0] for k in range(1, begun + 1)]]
    assert found["bytes"] == dataset.window_bytes(1, num_windows * 64) - int(firsts.sum())

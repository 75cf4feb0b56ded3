"""Layouts that are refused: these, no others, and by the command itself before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.config import RunConfig
from megatrain.plan import rules
from tests.in_process import Ended
from tests.parity.matrix import DEGREES, ENGINES, WORLD_SIZES, ZERO_STAGES, Case, parity_config
from tests.runs import TinyData, write_config

NO_DATA = TinyData(Path("none"), Path("none"), Path("none"), Path("none"))  # `check` reads none


def test_exactly_the_illegal_layouts_are_refused():
    axes = (WORLD_SIZES, DEGREES, DEGREES, ZERO_STAGES, (False, True), ENGINES)
    for world_size, tensor, pipeline, zero_stage, sequence, engine in itertools.product(*axes):
        data = max(world_size // (tensor * pipeline), 1)
        case = Case(data, tensor, pipeline, zero_stage, sequence, "none", "llama_mqa", engine)
        is_legal = case.is_legal and case.world_size == world_size
        problems = rules.problems(RunConfig.model_validate(case.config(NO_DATA)), world_size)
        assert (problems == []) == is_legal, (world_size, str(case), problems)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "key", "reason", "nearest"),
    [
        ("parallel.pipeline=2 parallel.zero_stage=3", 4, "zero_stage", "which a pipeline mixes", "zero_stage=2"),
        ("parallel.pipeline_chunks=2", 4, "pipeline_chunks", "parallel.pipeline is 1", "pipeline_chunks=1"),
        (
            "parallel.pipeline=2 parallel.pipeline_chunks=3",
            4,
            "pipeline_chunks",
            "at most model.num_hidden_layers (4)",
            "pipeline_chunks=2",
        ),
        ("parallel.sequence=true", 2, "sequence", "divided over the ranks of parallel.tensor", "sequence=false"),
        ("parallel.tensor=4", 2, "tensor", "must divide the 2 ranks", "tensor=2"),
        ("parallel.tensor=2 train.global_batch_size=12", 3, "tensor", "must divide the 3 ranks", "tensor=1"),
        ("parallel.pipeline=3", 4, "pipeline", "must divide the 4 ranks", "pipeline=4"),
        ("parallel.pipeline=8", 8, "pipeline", "must be at most model.num_hidden_layers (4)", "pipeline=4"),
        ("parallel.tensor=8", 8, "tensor", "must divide model.num_attention_heads (4)", "tensor=4"),
        ("parallel.zero_stage=0 parallel.offload=optimizer", 2, "offload", "zero_stage 1 or more", "zero_stage=1"),
        ("parallel.engine=fsdp2 parallel.offload=optimizer", 2, "offload", "does not offload", "engine=deepspeed"),
        ("parallel.zero_stage=1 parallel.offload=all", 2, "offload", "needs parallel.zero_stage 3", "zero_stage=3"),
    ],
)
def test_an_illegal_mix_names_key_reason_and_alternative(
    overrides, num_ranks, key, reason, nearest, tmp_path: Path, run_megatrain: Callable[..., Ended]
):
    def check(*words: str) -> Ended:
        return run_megatrain("check", config, *words, "--procs", num_ranks)

    config = write_config(tmp_path / "run.yaml", parity_config(NO_DATA, "llama_tied"))
    refused = check(*overrides.split())
    assert refused.code == 2
    assert refused.out == ""
    assert "Traceback" not in refused.err
    for expected in (f"parallel.{key}", reason, f"parallel.{nearest}"):
        assert expected in refused.err, refused.err
    mended = dict(override.split("=") for override in [*overrides.split(), f"parallel.{nearest}"])
    legal = check(*(f"{name}={value}" for name, value in mended.items()))
    assert legal.code == 0, legal.err


def test_all_problems_are_told_with_one_legal_layout(tmp_path: Path, run_megatrain: Callable[..., Ended]):
    config = write_config(tmp_path / "run.yaml", parity_config(NO_DATA, "llama_tied"))
    wrong = ["parallel.sequence=true", "parallel.pipeline=2", "parallel.zero_stage=3", "parallel.offload=optimizer"]
    refused = run_megatrain("check", config, *wrong, "train.micro_batch_size=3", "--procs", 2)
    assert refused.code == 2
    for key in ("parallel.sequence", "parallel.zero_stage", "train.global_batch_size", "nearest legal layout"):
        assert key in refused.err, refused.err

"""Which layouts are refused, why, and that the way out is legal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.config import RunConfig, load
from megatrain.errors import EXIT_USAGE, ConfigError
from megatrain.plan import rules

BASE = """\
run: {dir: runs/x}
model: {hidden_size: 64, intermediate_size: 96, num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 2}
data: {train: [{path: data/code}], seq_len: 256}
train: {steps: 200, global_batch_size: 16, micro_batch_size: 2}
optimizer: {lr: 1.0e-3}
"""


@pytest.fixture
def layout(tmp_path: Path) -> Callable[..., RunConfig]:
    path = tmp_path / "run.yaml"
    path.write_text(BASE, encoding="utf-8")
    return lambda *overrides: load(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "degree", "num_micro_batches"),
    [
        ([], 1, 1, 8),
        ([], 8, 8, 1),
        (["parallel.tensor=2"], 8, 4, 2),
        (["parallel.tensor=2", "parallel.pipeline=4"], 8, 1, 8),
        (["parallel.tensor=8"], 8, 1, 8),
        (["parallel.pipeline=4", "train.global_batch_size=4"], 4, 1, 2),
        (["parallel.pipeline=3"], 3, 1, 8),
        (["parallel.zero_stage=3", "parallel.offload=all"], 4, 4, 2),
        (["parallel.zero_stage=0"], 4, 4, 2),
        (["train.global_batch_size=[[0, 8], [100, 24], [200, 16]]"], 4, 4, 3),
        (["parallel.zero_stage=0", "parallel.pipeline=2"], 4, 2, 4),
        (["parallel.tensor=2", "parallel.sequence=true", "parallel.zero_stage=3"], 2, 1, 8),
    ],
)
def test_a_legal_layout_passes(layout, overrides, world_size, degree, num_micro_batches):
    config = layout(*overrides)
    rules.check(config, world_size)
    assert rules.problems(config, world_size) == []
    assert rules.data_degree(config, world_size) == degree
    assert rules.num_micro_batches(config, world_size) == num_micro_batches


@pytest.mark.parametrize(
    ("overrides", "world_size", "key", "reason", "nearest"),
    [
        ([], 3, "train.global_batch_size", "(2 x 3 = 6)", "train.global_batch_size=18 or 12"),
        (["train.micro_batch_size=3"], 1, "train.global_batch_size", "(3 x 1 = 3)", "train.micro_batch_size=4 or 2"),
        (
            ["train.global_batch_size=[[0, 8], [100, 10], [200, 12]]"],
            4,
            "train.global_batch_size",
            "each size must be divisible by micro_batch_size x data degree (2 x 4 = 8); not so: 10, 12",
            "train.global_batch_size=[[0, 8], [100, 8], [200, 8]] or [[0, 8], [100, 16], [200, 16]]",
        ),
        (
            ["train.global_batch_size=[[0, 2], [100, 6]]"],
            2,
            "train.global_batch_size",
            "not so: 2, 6",
            "train.micro_batch_size=1",
        ),
        (["train.global_batch_size=1"], 1, "train.global_batch_size", "(2 x 1 = 2)", "train.micro_batch_size=1"),
        (["parallel.tensor=4"], 2, "parallel.tensor", "(4 would do)", "parallel.tensor=2 or 1"),
        (["parallel.tensor=4"], 6, "parallel.tensor", "must divide the 6 ranks", None),
        (
            ["parallel.pipeline=3"],
            4,
            "parallel.pipeline",
            "must divide the 4 ranks (3 or 6",
            "parallel.pipeline=4 or 2",
        ),
        (["parallel.tensor=2", "parallel.pipeline=2"], 2, "parallel.pipeline", "(2 x 2)", "parallel.pipeline=1"),
        (
            ["parallel.pipeline=8"],
            8,
            "parallel.pipeline",
            "at most model.num_hidden_layers (4)",
            "parallel.pipeline=4 or 2",
        ),
        (
            ["parallel.pipeline=2", "parallel.zero_stage=3"],
            4,
            "parallel.zero_stage",
            "which a pipeline mixes",
            "parallel.zero_stage=2 or 1",
        ),
        (["parallel.sequence=true"], 4, "parallel.sequence", "parallel.tensor, which is 1", "parallel.sequence=false"),
        (
            ["parallel.sequence=true", "parallel.tensor=4", "data.seq_len=254"],
            4,
            "data.seq_len",
            "must be divisible by parallel.tensor (4)",
            "data.seq_len=256 or 252",
        ),
        (
            ["parallel.offload=optimizer", "parallel.zero_stage=0"],
            4,
            "parallel.offload",
            "needs parallel.zero_stage 1 or more (it is 0)",
            "parallel.zero_stage=1 or 2",
        ),
        (["parallel.offload=all"], 4, "parallel.offload", "needs parallel.zero_stage 3", "parallel.zero_stage=3"),
        (
            ["deepspeed.zero_optimization={overlap_comm: true}"],
            4,
            "parallel.zero_stage",
            "must be 2 or 3 with deepspeed.zero_optimization.overlap_comm",
            "parallel.zero_stage=2 or 3",
        ),
        (
            ["parallel.offload=all", "parallel.pipeline=2"],
            4,
            "parallel.offload",
            "needs parallel.zero_stage 3",
            "parallel.offload=optimizer or none",
        ),
        (["parallel.pipeline_chunks=2"], 4, "parallel.pipeline_chunks", "is 1", "parallel.pipeline_chunks=1"),
        (
            ["parallel.pipeline=2", "parallel.pipeline_chunks=3"],
            4,
            "parallel.pipeline_chunks",
            "at most model.num_hidden_layers (4)",
            None,
        ),
    ],
)
def test_an_illegal_layout_names_key_reason_and_alternative(layout, overrides, world_size, key, reason, nearest):
    (problem,) = rules.problems(layout(*overrides), world_size)
    assert problem.key == key
    assert reason in problem.reason
    if nearest is not None:
        assert problem.nearest == nearest


def test_chunks_of_two_stacks_are_refused(layout: Callable[..., RunConfig]) -> None:
    t5 = ["model.family=t5", "model.num_key_value_heads=null", "objective.type=sequence_to_sequence"]
    for legal in (["parallel.pipeline=4"], ["parallel.engine=fsdp2"], ["train.compile=on"], ["parallel.pipeline=8"]):
        assert rules.problems(layout(*t5, *legal), 8) == []
    (problem,) = rules.problems(layout(*t5, "parallel.pipeline=2", "parallel.pipeline_chunks=2"), 8)
    assert (problem.key, problem.nearest) == ("parallel.pipeline_chunks", "parallel.pipeline_chunks=1")
    assert "hold weights that family t5's encoder and decoder share twice" in problem.reason
    problems = rules.problems(layout(*t5, "parallel.pipeline=16", "train.global_batch_size=16"), 16)
    assert [problem.reason for problem in problems] == [
        "must be at most model.num_hidden_layers + model.num_decoder_layers (8)"
    ]


@pytest.mark.parametrize(
    ("sizes", "tensor", "broken"),
    [
        ({"num_key_value_heads": 2}, 4, None),  # each key/value head on two ranks
        ({"num_key_value_heads": 8}, 4, None),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}, 4, "model.num_key_value_heads (6)"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}, 3, None),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}, 4, "model.num_attention_heads (6)"),
        ({"intermediate_size": 98}, 4, "the width of the MLP (98)"),
        ({"intermediate_size": "null"}, 8, None),
    ],
)
def test_tensor_ranks_share_heads_and_mlp_evenly(layout, sizes, tensor, broken):
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    found = rules.problems(layout(*overrides, f"parallel.tensor={tensor}"), tensor)
    assert [problem.key for problem in found] == ([] if broken is None else ["parallel.tensor"])
    assert broken is None or broken in found[0].reason


def test_all_problems_are_listed_with_one_remedy(layout):
    wrong = [
        "parallel.tensor=3",
        "parallel.pipeline=5",
        "parallel.zero_stage=3",
        "parallel.sequence=true",
        "train.global_batch_size=17",
    ]
    with pytest.raises(ConfigError) as caught:
        rules.check(layout(*wrong), 8)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert message.startswith("the layout on 8 ranks: 7 problems\n")
    assert "train.global_batch_size: 17 given; must be divisible by micro_batch_size x data degree" in message
    assert "parallel.zero_stage: 3 given; DeepSpeed's ZeRO 3" in message
    mended = message.rpartition("nearest legal layout: ")[2].split()
    rules.check(layout(*wrong, *mended), 8)


@pytest.mark.slow
def test_every_suggestion_mends_its_problem_and_breaks_nothing(layout):
    """Over a grid of layouts: each suggestion, applied, removes its problem; the whole's suggestion is legal."""
    grid = itertools.product((1, 3, 8), (1, 2, 5), (1, 3), (False, True), ("none", "all"), (12, 16), (1, 6, 8))
    num_refused = 0
    for tensor, pipeline, zero, sequence, offload, batch, world_size in grid:
        given = [
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.zero_stage={zero}",
            f"parallel.sequence={str(sequence).lower()}",
            f"parallel.offload={offload}",
            f"train.global_batch_size={batch}",
        ]
        config = layout(*given)
        found = rules.problems(config, world_size)
        reasons = {problem.reason.split("(")[0] for problem in found}
        for problem in found:
            if problem.nearest is None:
                continue
            changes, _, other = problem.nearest.partition(" or ")
            ways = [changes.split()] + ([[f"{changes.partition('=')[0]}={other}"]] if other else [])
            for way in ways:
                left = rules.problems(layout(*given, *way), world_size)
                assert len(left) < len(found), (given, world_size, problem, left)
                assert {p.reason.split("(")[0] for p in left} <= reasons
        if found:
            num_refused += 1
            legal = rules.nearest_layout(config, world_size)
            assert legal is not None, (given, world_size)
            assert rules.problems(layout(*given, *legal.split()), world_size) == []
    assert num_refused > 200


def test_no_ranks_are_refused(layout):
    assert rules.problems(layout(), 0)[0].nearest == "1"


def test_the_smallest_world_is_one_model_copy(layout):
    config = layout("parallel.tensor=2", "parallel.pipeline=4")
    assert rules.model_ranks(config) == 8
    rules.check(config, rules.model_ranks(config))

"""Encoders with their decoders: every layout trains what one rank does, and a resumed run the same to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.figures import Pool, gather_state
from tests.parity.matrix import parity_config
from tests.parity.saves import assert_resumes_exactly, write_manifest
from tests.parity.test_compiled import TRACED

LONGER = (pytest.mark.slow, pytest.mark.acceptance)
NUM_STEPS = 4
SPANS, PAIRS = "span_corruption", "sequence_to_sequence"
FSDP2 = {"engine": "fsdp2"}
QUICK: list[tuple[str, str, int, dict[str, Any]]] = [
    ("t5", PAIRS, 2, {"tensor": 2, "sequence": True}),
    ("t5_tied", SPANS, 2, {"zero_stage": 3}),
    ("t5_tied", PAIRS, 2, {"pipeline": 2, "zero_stage": 1}),
    ("t5", SPANS, 2, {**FSDP2, "zero_stage": 3}),
    ("marian", PAIRS, 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
]
LAYOUTS = [
    *QUICK,
    *(("t5", SPANS, 2, {"zero_stage": stage}) for stage in range(3)),
    ("t5", PAIRS, 2, {"zero_stage": 1, "recompute": "full"}),
    ("t5", PAIRS, 2, {"tensor": 2, "recompute": "selective"}),
    ("t5_tied", PAIRS, 4, {"tensor": 2, "zero_stage": 3}),
    ("t5_tied", PAIRS, 4, {"tensor": 4, "sequence": True, "recompute": "full"}),
    ("t5_tied", PAIRS, 4, {"tensor": 2, "zero_stage": 2}),
    ("t5", SPANS, 2, {"pipeline": 2, "zero_stage": 0, "recompute": "selective"}),
    ("t5_tied", PAIRS, 4, {"pipeline": 4, "zero_stage": 0}),  # each relative bias is on several stages
    ("t5", PAIRS, 4, {"pipeline": 4, "zero_stage": 1, "recompute": "full"}),
    ("t5_tied", PAIRS, 4, {"pipeline": 2, "zero_stage": 2}),
    ("t5_tied", PAIRS, 4, {"pipeline": 2, "tensor": 2, "sequence": True, "zero_stage": 1}),
    ("t5_tied", PAIRS, 2, {**FSDP2, "zero_stage": 1}),
    ("t5_tied", PAIRS, 2, {**FSDP2, "zero_stage": 3, "recompute": "full"}),
    ("t5", PAIRS, 4, {**FSDP2, "zero_stage": 2, "tensor": 2, "sequence": True}),
    ("t5_tied", PAIRS, 4, {**FSDP2, "pipeline": 4, "zero_stage": 0}),
    ("t5_tied", PAIRS, 4, {**FSDP2, "pipeline": 2, "zero_stage": 3}),
    ("marian", PAIRS, 2, {"pipeline": 2, "zero_stage": 1}),
    ("marian", PAIRS, 4, {"pipeline": 4, "zero_stage": 0, "recompute": "full"}),
    ("marian_untied", PAIRS, 4, {"pipeline": 2, "tensor": 2, "sequence": True, "zero_stage": 1}),
    ("marian", PAIRS, 2, {**FSDP2, "zero_stage": 3}),
    ("marian_untied", PAIRS, 4, {**FSDP2, "pipeline": 2, "zero_stage": 2}),
    *(("marian", PAIRS, 2, {"zero_stage": stage}) for stage in range(4)),
    ("marian", PAIRS, 2, {"tensor": 2, "recompute": "selective"}),
    ("marian", PAIRS, 4, {"tensor": 2, "zero_stage": 3}),
    ("marian_untied", PAIRS, 2, {"tensor": 2}),
    ("marian_untied", PAIRS, 4, {"tensor": 4, "sequence": True, "zero_stage": 2}),
]


def sections(objective: str, data: Path, folder: Path, model: str = "t5") -> dict[str, dict[str, Any]]:
    smoothing = {"label_smoothing": 0.1} if model == "marian" else {}
    return {
        "run": {"dir": str(folder)},
        "data": {"train": [str(data)], "validation": [], "seq_len": 44},
        "objective": {"type": objective, "target_len": 36 if objective == PAIRS else None, **smoothing},
    }


@pytest.fixture
def datasets(translations: Path, sentinel_data: Path) -> dict[str, Path]:
    return {PAIRS: translations, SPANS: sentinel_data}


@pytest.mark.parametrize(
    ("model", "objective", "num_ranks", "parallel"),
    [pytest.param(*row, marks=() if row in QUICK else LONGER) for row in LAYOUTS],
    ids=str,
)
def test_a_layout_trains_as_one_rank_does(
    model: str,
    objective: str,
    num_ranks: int,
    parallel: dict[str, Any],
    pool: Pool,
    datasets: dict[str, Path],
    tmp_path: Path,
) -> None:
    own = sections(objective, datasets[objective], tmp_path, model)
    train = {"micro_batch_size": 2}
    found = pool.train(num_ranks, parity_config(pool.data, model, **own, parallel=parallel, train=train), NUM_STEPS)
    found.assert_equals(pool.alone(model, NUM_STEPS, **own))


DROPPING = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"pipeline": 2, "recompute": "full"}),
        pytest.param(4, {"pipeline": 2, "tensor": 2, "sequence": True}, marks=pytest.mark.acceptance),
        pytest.param(2, {**FSDP2, "tensor": 2, "sequence": True, "zero_stage": 3}, marks=pytest.mark.acceptance),
    ],
    ids=str,
)
def test_layouts_drop_what_one_rank_does(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, translations: Path, tmp_path: Path
) -> None:
    own = {**sections(PAIRS, translations, tmp_path), "model": DROPPING}
    config = parity_config(pool.data, "t5_tied", **own, parallel=parallel, train={"micro_batch_size": 2})
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone("t5_tied", NUM_STEPS, **own))


@pytest.mark.parametrize(
    ("model", "objective", "parallel"),
    [
        ("t5", SPANS, {}),
        pytest.param("t5", PAIRS, {}, marks=LONGER),
        pytest.param("t5", PAIRS, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param("t5", SPANS, {**FSDP2, "zero_stage": 3}, marks=LONGER),
        pytest.param("marian", PAIRS, {"tensor": 2}, marks=LONGER),
    ],
    ids=str,
)
def test_a_resumed_pair_of_stacks_is_bit_equal(
    model: str, objective: str, parallel: dict[str, Any], pool: Pool, datasets: dict[str, Path], tmp_path: Path
) -> None:
    own = {**sections(objective, datasets[objective], tmp_path, model), "model": DROPPING, "parallel": parallel}
    config = parity_config(pool.data, model, **own, train={"micro_batch_size": 2})
    assert_resumes_exactly(pool, config, tmp_path / "half")


PIPELINE = (4, {"pipeline": 4, "zero_stage": 0})  # each relative bias is on two stages, the embedding on three


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        pytest.param(model, source, target, marks=pytest.mark.acceptance if number else ())
        for number, (model, source, target) in enumerate(
            [
                ("t5_tied", PIPELINE, (2, {"zero_stage": 3})),
                ("t5_tied", (2, {"zero_stage": 2}), PIPELINE),
                ("t5_tied", PIPELINE, (4, {**FSDP2, "pipeline": 2, "zero_stage": 3})),
                ("t5_tied", (4, {"pipeline": 2, "tensor": 2}), (1, {"zero_stage": 0})),
                ("t5_tied", (2, {**FSDP2, "zero_stage": 1}), (4, {"pipeline": 2, "tensor": 2})),
                ("marian", (2, {"zero_stage": 3}), (2, {"tensor": 2, "sequence": True})),
                ("marian", (2, {"tensor": 2}), PIPELINE),
                ("marian_untied", PIPELINE, (2, {"zero_stage": 3})),
            ]
        )
    ],
    ids=str,
)
def test_state_of_both_stacks_goes_on_elsewhere(
    model: str,
    source: tuple[int, dict[str, Any]],
    target: tuple[int, dict[str, Any]],
    pool: Pool,
    translations: Path,
    tmp_path: Path,
) -> None:
    own = sections(PAIRS, translations, tmp_path, model)
    configs = [
        parity_config(pool.data, model, **own, parallel=parallel, train={"micro_batch_size": 2})
        for _, parallel in (source, target)
    ]
    saved, again = tmp_path / "saved", tmp_path / "again"
    whole = pool.answer(source[0], {"config": configs[0], "num_steps": 4, "save": str(saved), "save_after": 2})
    write_manifest(saved, configs[0], 2)
    case = {"config": configs[1], "first_step": 2, "num_steps": 2, "load": str(saved), "num_updates": 2}
    found = pool.answer(target[0], {**case, "save": str(again), "save_after": 0})
    state = gather_state(saved)
    assert state.keys() == (loaded := gather_state(again)).keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in state.items())
    assert found["losses"] == pytest.approx(whole["losses"][2:], rel=1e-4)


LORA = {"rank": 4, "alpha": 24.0, "dropout": 0.25, "target_modules": ["q", "v", "wi_0", "wo"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"pipeline": 2, "zero_stage": 1}),
        pytest.param(2, {"zero_stage": 3}, marks=pytest.mark.acceptance),
        pytest.param(2, {"tensor": 2, "sequence": True, "recompute": "full"}, marks=pytest.mark.acceptance),
        pytest.param(4, {**FSDP2, "pipeline": 2, "zero_stage": 3}, marks=pytest.mark.acceptance),
    ],
    ids=str,
)
def test_adapters_of_both_stacks_train_alike(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, translations: Path, tmp_path: Path
) -> None:
    own = {**sections(PAIRS, translations, tmp_path), "lora": LORA, "optimizer": {"lr": 1.0e-2}}
    own["run"] = {"init_from": "unused", **own["run"]}
    config = parity_config(pool.data, "t5_tied", **own, parallel=parallel, train={"micro_batch_size": 2})
    found = pool.train(num_ranks, config, NUM_STEPS)
    found.assert_equals(pool.alone("t5_tied", NUM_STEPS, **own))
    assert {name.partition(".")[0] for name in found.weights} == {"encoder", "decoder"}
    assert all(weight.any() for weight in found.weights.values())


COMPILED = [
    ("t5", {"tensor": 2, "sequence": True}, TRACED),
    ("t5_tied", {"pipeline": 2, "recompute": "selective"}, TRACED),
    ("t5_tied", {**FSDP2, "zero_stage": 3, "recompute": "full"}, TRACED),
    ("marian", {"pipeline": 2}, TRACED),
    ("t5", {"zero_stage": 1}, None),
    ("marian", {"tensor": 2, "sequence": True}, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parallel", "backend"),
    [pytest.param(*row, marks=pytest.mark.acceptance if number else ()) for number, row in enumerate(COMPILED)],
    ids=str,
)
def test_compiled_stacks_train_as_eager_ones_do(
    model: str, parallel: dict[str, Any], backend: str | None, pool: Pool, translations: Path, tmp_path: Path
) -> None:
    """As tests/parity/test_compiled.py: ``TRACED`` is all but the generation of code, None is that too."""
    own = sections(PAIRS, translations, tmp_path, model)
    train = {"micro_batch_size": 2, "compile": "on"}
    config = parity_config(pool.data, model, **own, parallel=parallel, train=train)
    pool.train(2, config, NUM_STEPS, backend=backend).assert_equals(pool.alone(model, NUM_STEPS, **own))


TASKS = """
- {name: write, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 6}
- {name: beams, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 4, num_beams: 2}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"pipeline": 2}),
        pytest.param(2, {"zero_stage": 3}, marks=pytest.mark.acceptance),
        pytest.param(2, {"tensor": 2, "sequence": True}, marks=pytest.mark.acceptance),
        pytest.param(2, {**FSDP2, "zero_stage": 1}, marks=pytest.mark.acceptance),
        pytest.param(4, {**FSDP2, "pipeline": 2, "zero_stage": 3}, marks=pytest.mark.acceptance),
        pytest.param(4, {"pipeline": 4}, marks=pytest.mark.acceptance),
    ],
    ids=str,
)
def test_tasks_are_answered_as_one_rank_does(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, translations: Path, tmp_path: Path
) -> None:
    """Sources of unequal lengths, of which one rank has fewer than another."""
    rows = [{"q": " ".join(map(str, range(n % 4, 3 + 2 * n))), "a": str(n)} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(TASKS.replace("PATH", str(tmp_path / "rows.jsonl")))

    def answers(world_size: int, parallel: dict[str, Any]) -> Any:
        own = sections(PAIRS, translations, tmp_path)
        config = parity_config(pool.data, "t5_tied", **own, parallel=parallel, train={"micro_batch_size": 2})
        return pool.answer(world_size, {"config": config, "num_steps": 2, "tasks": str(tasks)})["tasks"]

    ours = answers(num_ranks, parallel)
    assert [len(records) for records in ours.values()] == [5, 5]
    assert ours == answers(1, {"zero_stage": 0})

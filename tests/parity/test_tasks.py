"""Tasks answered by the engine that trains: what one rank answers, every layout does, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config

pytestmark = pytest.mark.slow

SENTENCE = "The statement is executed if an expression of a class yields the name of another object in this list"
WORDS = SENTENCE.split()
ROWS = [{"q": " ".join(WORDS[n : n + 2 + n % 3]), "a": WORDS[n + 5], "b": WORDS[n + 6]} for n in range(7)]
TASKS = """
- {name: choose, kind: choices, path: PATH, prompt: "{{ q }}", answer: "0", choices: ["{{ a }}", "{{ b }} {{ a }}"]}
- {name: text, kind: perplexity, path: PATH, prompt: "", answer: "{{ q }} {{ a }}", shots: 1}
- {name: write, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 5}
- {name: alone, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 9, limit: 1}
"""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero 1": (2, {"zero_stage": 1}),
    "zero 3": (2, {"zero_stage": 3}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (2, {"tensor": 2, "sequence": True, "recompute": "selective"}),
    "pipeline": (2, {"pipeline": 2}),
    "interleaved": (2, {"pipeline": 2, "pipeline_chunks": 2, "recompute": "full"}),
    "fsdp2 zero 1": (2, {"engine": "fsdp2", "zero_stage": 1}),
    "fsdp2 zero 3": (2, {"engine": "fsdp2", "zero_stage": 3}),
    "pipeline, zero 1": (4, {"pipeline": 2, "zero_stage": 1}),
    "sequence, zero 3": (4, {"tensor": 2, "sequence": True, "zero_stage": 3}),
    "fsdp2 pipeline, zero 3": (4, {"engine": "fsdp2", "pipeline": 2, "zero_stage": 3}),
    "all axes": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of seven examples and of one: some ranks have fewer than others, or none."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks.yaml").write_text(TASKS.replace("PATH", str(folder / "rows.jsonl")))
    return folder / "tasks.yaml"


@pytest.mark.sample(5)
@pytest.mark.parametrize("model", ["llama_tied", pytest.param("gpt2", marks=pytest.mark.acceptance)])
@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_answers_as_one_process(
    num_ranks: int, parallel: dict[str, Any], model: str, tasks: Path, pool: Pool
) -> None:
    def answers(world_size: int, parallel: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        config = parity_config(pool.data, model, parallel=parallel)
        found: dict[str, Any] = pool.answer(world_size, {"config": config, "num_steps": 2, "tasks": str(tasks)})
        return found["tasks"]  # type: ignore[no-any-return]

    ours, alone = answers(num_ranks, parallel), answers(1, {"zero_stage": 0})
    assert [len(records) for records in ours.values()] == [7, 7, 7, 1]
    for name, records in alone.items():
        for mine, reference in zip(ours[name], records, strict=True):
            for key, value in reference.items():
                if key.startswith("log_likelihood"):
                    assert mine[key] == pytest.approx(value, abs=1e-3), (name, key)
                else:
                    assert mine[key] == value, (name, key)

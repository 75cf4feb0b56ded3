"""Scores of a run's model beside transformers on its export, and the figures that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatrain
from megatrain.config.tasks import Task
from megatrain.data import open_dataset
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.tasks.metrics import judge_choices, summarize
from megatrain.tasks.prompts import Example
from megatrain.tasks.scoring import Request, score
from megatrain.train.convert import export_checkpoint
from tests.in_process import Ended
from tests.runs import TinyData

ROWS = [
    {"q": "The statement", "a": "is executed", "wrong": ["eats grass", "läuft über den Rhein"]},
    {"q": "A class", "a": "definition", "wrong": ["of wine", "is not"]},
    {"q": "An expression", "a": "list", "wrong": ["of anger in a face", "s"]},
    {"q": "The import", "a": "statement", "wrong": ["duty", "of it"]},
]
TASKS = """
- {name: choose, kind: choices, path: PATH, prompt: "{{ q }}", answer: "0", choices: "{{ [a] + wrong }}", shots: 1}
- {name: text, kind: perplexity, path: PATH, prompt: "", answer: "{{ q }} {{ a }}"}
- {name: write, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 4}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "tasks.yaml").write_text(TASKS.replace("PATH", str(folder / "rows.jsonl")), encoding="utf-8")
    return folder / "tasks.yaml"


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint(finished_run, folder)
    return folder


def test_scores_are_those_of_transformers(finished_run: Path, exported: Path, tasks: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    choose, *_ = evaluate_tasks(finished_run, tasks)
    for outcome in choose.outcomes:
        example = outcome.example
        for text, found in zip(example.continuations, outcome.record["log_likelihoods"], strict=True):
            before = len(tokenizer(example.prompt)["input_ids"])
            ids = torch.tensor([tokenizer(example.prompt + text)["input_ids"]])
            with torch.inference_mode():
                scores = twin(ids).logits[0].log_softmax(-1)
            expected = sum(float(scores[k - 1, ids[0, k]]) for k in range(before, ids.shape[1]))
            assert found == pytest.approx(expected, abs=1e-4)


def test_a_score_ignores_its_batch(finished_run: Path) -> None:
    module = megatrain.load(finished_run).module
    requests = [Request(tuple(range(5, 5 + n)), tuple(range(20, 20 + n % 3 + 1))) for n in range(1, 12)]
    together = score(module, requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = score(module, [request])
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        assert found.is_greedy == alone.is_greedy


def test_generated_text_ends_at_a_stop(finished_run: Path, tasks: Path) -> None:
    *_, written = evaluate_tasks(finished_run, tasks)
    model = megatrain.load(finished_run)
    for outcome in written.outcomes:
        whole = model.generate(outcome.example.prompt, 4)
        assert outcome.record["generated"] == whole.partition("\n")[0]


def test_an_empty_prompt_begins_a_document(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "", "a": "i"}\n')
    tasks = [
        {"name": kind, "kind": kind, "path": str(tmp_path / "rows.jsonl"), "prompt": "{{ q }}", "answer": "{{ a }}"}
        for kind in ("perplexity", "generate")
    ]
    tasks[1]["max_new_tokens"] = 4
    (tmp_path / "tasks.yaml").write_text(json.dumps(tasks))
    _, written = evaluate_tasks(finished_run, tmp_path / "tasks.yaml")
    model = megatrain.load(finished_run)
    end = model._assets.special_tokens.eod.token
    assert written.outcomes[0].record["generated"] == model.generate(end, 4).partition("\n")[0]


def test_ranks_share_examples_with_equal_results(
    finished_run: Path, tasks: Path, tmp_path: Path, run_megatrain: Callable[..., Ended]
) -> None:
    shown, lines = [], []
    for procs in (1, 2):
        out = tmp_path / f"{procs}.jsonl"
        ran = run_megatrain("eval", finished_run, "--tasks", tasks, "--json", "--out", out, "--procs", procs)
        assert ran.code == 0, ran.err
        shown.append(json.loads(ran.out)["tasks"])
        lines.append([(row["task"], row["row"], row["prompt"]) for row in map(json.loads, out.open(encoding="utf-8"))])
    assert lines[0] == lines[1]
    assert shown[0].keys() == {"choose", "text", "write"}
    for name, metrics in shown[0].items():
        for metric, figures in metrics.items():
            assert figures["value"] == pytest.approx(shown[1][name][metric]["value"], abs=1e-6)
            assert figures["n"] == len(ROWS)


def test_shots_without_room_are_left_out(finished_run: Path, tmp_path: Path) -> None:
    context = megatrain.load(finished_run).config.max_position_embeddings
    rows = [{"q": "a b c d e f g h " * n, "a": "i"} for n in (1, 2, 3, context)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"[{{name: t, kind: perplexity, path: {tmp_path}/rows.jsonl, prompt: '{{{{ q }}}}', answer: '{{{{ a }}}}'}}]"
    (tmp_path / "tasks.yaml").write_text(text)
    (result,) = evaluate_tasks(finished_run, tmp_path / "tasks.yaml", 3)
    assert list(result.skipped) == [3]
    assert result.num_shots_dropped >= 3
    assert result.metrics["loss"].n == 3


def example_of(choices: tuple[str, ...]) -> Example:
    return Example(0, "", (), (), "q", " ", "\n", choices, choices, choices[0], 0)


def test_each_normalizer_has_its_own_winner() -> None:
    task: Any = Task.model_construct(name="t", kind="choices")
    example = example_of(("ab", "éééé", "abcdefghij"))
    figures = judge_choices(task, example, [-4.0, -6.0, -19.0], [1, 2, 9]).record["chosen"]
    assert figures == {"acc": 0, "acc_norm": 1, "acc_bytes": 1, "acc_tokens": 2}
    figures = judge_choices(task, example_of(("éé", "abc")), [-4.0, -5.0], [1, 1]).record["chosen"]
    assert (figures["acc_norm"], figures["acc_bytes"]) == (1, 0)


def test_standard_errors_are_those_of_a_mean() -> None:
    task: Any = Task.model_construct(name="t", kind="choices")
    likelihoods = [[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0], [-1.0, -3.0]]
    outcomes = [judge_choices(task, example_of(("a", "b")), each, [1, 1]) for each in likelihoods]
    metrics = summarize(task, outcomes)
    assert metrics["acc"].value == 0.75
    assert metrics["acc"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert metrics["ties"].value == 0.25


def test_examples_of_the_training_data_are_found(finished_run: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    dataset = open_dataset(tiny_data.prose)
    words = dataset.tokenizer.decode(dataset.document(3).tolist()).split()
    rows = [
        {"q": " ".join(words[20:31]).upper(), "a": ", ".join(words[31:36])},
        {"q": "nobody has ever written these words about thirteen large blue herons in this order", "a": "yet"},
        {"q": words[20], "a": words[21]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = f"[{{name: t, kind: perplexity, path: {tmp_path}/rows.jsonl, prompt: '{{{{ q }}}}', answer: '{{{{ a }}}}'}}]"
    (tmp_path / "tasks.yaml").write_text(text)
    (result,) = evaluate_tasks(finished_run, tmp_path / "tasks.yaml", training_data=[str(tiny_data.prose)])
    assert result.seen == {0}
    assert result.figures["seen_in_training"].value == pytest.approx(1 / 3)

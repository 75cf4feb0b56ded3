"""Files of tasks, their templates, the solved rows before each example, and how a text is cut from its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatrain.config.tasks import Task, read_tasks
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.tasks.prompts import encode_pair, make_examples
from tests import tokenizer_samples

ROWS = [{"q": f"question {k}", "a": f"right {k}", "wrong": [f"wrong {k}", f"worse {k}"]} for k in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def choices_task(rows: Path, **changed: Any) -> Task:
    settings = {
        "name": "t",
        "kind": "choices",
        "path": str(rows),
        "prompt": "Q: {{ q }}\nA:",
        "answer": "{{ a }}",
        "choices": "{{ [a] + wrong }}",
    }
    return Task.model_validate({**settings, **changed})


def test_a_prompt_has_solved_rows_before_it(rows: Path) -> None:
    example = make_examples(choices_task(rows, description="Facts."), 2, seed=1)[3]
    first, second = (ROWS[shot] for shot in example.shots)
    expected = f"Facts.\n\nQ: {first['q']}\nA: {first['a']}\n\nQ: {second['q']}\nA: {second['a']}\n\nQ: question 3\nA:"
    assert example.prompt == expected
    assert example.continuations == (" right 3", " wrong 3", " worse 3")
    assert example.gold == 0


def test_shots_never_hold_the_example_itself(rows: Path) -> None:
    examples = make_examples(choices_task(rows), len(ROWS) - 1, seed=1)
    assert all(set(example.shots) == set(range(len(ROWS))) - {example.row} for example in examples)


def test_shots_depend_on_seed_and_row_alone(rows: Path) -> None:
    whole, cut = (make_examples(choices_task(rows, limit=limit), 3, seed=1) for limit in (None, 5))
    assert cut == whole[:5]
    assert make_examples(choices_task(rows), 3, seed=2) != whole


def test_more_shots_than_rows_are_refused(rows: Path) -> None:
    with pytest.raises(ConfigError, match="20 shots are more than the 20 rows"):
        make_examples(choices_task(rows), 20, seed=1)


def test_an_answer_may_be_an_index(rows: Path) -> None:
    (example, *_) = make_examples(choices_task(rows, answer="2"), 0, seed=1)
    assert (example.gold, example.answer) == (2, "worse 0")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "{{ nothing }}"}, "row 0 of .*'nothing' is undefined"),
        ({"answer": "neither"}, "'neither' is none of the choices"),
        ({"choices": ["{{ a }}", "{{ a }}"]}, "are not two or more different texts"),
        ({"answer": "{{ ''.__class__.__mro__ }}"}, "template fails"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(rows: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_examples(choices_task(rows, **changed), 0, seed=1)


def test_all_problems_of_a_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("- {name: a, kind: choice, path: x, prompt: p, answer: a}\n- {name: b, kind: generate, shotz: 3}\n")
    with pytest.raises(ConfigError) as caught:
        read_tasks(path)
    message = str(caught.value)
    assert "0.kind (line 1): choice given; must be one of choices, generate, perplexity; nearest: choices" in message
    assert "1.shotz (line 2): 3 given; no such key; nearest: 1.shots" in message
    assert "1.path" in message


@pytest.mark.parametrize("name", ["llama3", "qwen3", "llama2"])
def test_pairs_are_cut_as_the_harness_does(name: str) -> None:
    """The reference is lm-evaluation-harness's ``TemplateLM._encode_pair``; its own code where it is installed."""
    harness = pytest.importorskip("lm_eval.api.model")
    data = getattr(tokenizer_samples, name)().to_str().encode()
    tokenizer = Tokenizer(data, name)

    class Encodes:
        backend = "causal"

        def tok_encode(self, text: str, **ignored: Any) -> list[int]:
            return tokenizer.encode(text)

    for context, text in [("to be", " or not"), ("to be ", "or not"), ("be  ", "the"), ("A:", "\nthe"), ("not", "e")]:
        expected = harness.TemplateLM._encode_pair(Encodes(), context, text)
        assert encode_pair(tokenizer, context, text) == expected

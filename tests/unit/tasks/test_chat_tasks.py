"""Tasks asked by a chat template: the token ids that transformers gives the conversation, and its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megatrain.config.tasks import read_tasks
from megatrain.errors import ConfigError, DataError
from megatrain.inference.writer import open_writer
from megatrain.tasks import evaluation
from megatrain.tasks.evaluation import evaluate_tasks, read_questions

ROWS = [{"q": "the other", "a": "not", "b": "the"}, {"q": "to be", "a": "or not", "b": "be"}, {"q": "be", "a": "to"}]
TASKS = """
- {name: choose, kind: choices, path: PATH, prompt: "{{ q }}", answer: "0", choices: ["{{ a }}", "{{ b }}"], limit: 2,
   chat: true, shots: 1, description: be brief}
- {name: text, kind: perplexity, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", chat: true}
- {name: write, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", chat: true, max_new_tokens: 6}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"b": "the end", **row}) + "\n" for row in ROWS))
    (tmp_path / "tasks.yaml").write_text(TASKS.replace("PATH", str(tmp_path / "rows.jsonl")))
    return tmp_path / "tasks.yaml"


def test_ids_are_those_of_the_chat_template(chat_folder: Path, tasks: Path) -> None:
    reference: Any = AutoTokenizer.from_pretrained(chat_folder)
    writer, _ = open_writer(chat_folder.parent / "checkpoint")
    assert writer.begin([]) == [reference.bos_token_id]
    for task, examples in read_questions(tasks):
        for example in examples:
            ids = reference.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=False)
            assert ids.count(reference.bos_token_id) == 1
            asked = evaluation._requests(task, example, writer)
            assert {request.context for request in asked} == {tuple(ids)}
            for request, text in zip(asked, example.scored, strict=False):
                assert reference.decode(request.continuation) == text
    messages = read_questions(tasks)[0].examples[0].messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[-1]["content"] == "the other"


def test_scores_and_texts_are_those_of_transformers(chat_folder: Path, tasks: Path) -> None:
    twin: Any = LlamaForCausalLM.from_pretrained(chat_folder)
    reference: Any = AutoTokenizer.from_pretrained(chat_folder)
    choose, text, write = evaluate_tasks(chat_folder.parent / "checkpoint", tasks)

    def ids_of(outcome: Any) -> torch.Tensor:
        found: torch.Tensor = reference.apply_chat_template(
            outcome.record["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        return found

    def log_likelihood(before: torch.Tensor, answer: str) -> float:
        ids = torch.cat([before, reference(answer, add_special_tokens=False, return_tensors="pt").input_ids], 1)
        with torch.inference_mode():
            scores = twin(ids).logits[0].log_softmax(-1)
        return sum(float(scores[k - 1, ids[0, k]]) for k in range(before.shape[1], ids.shape[1]))

    for outcome in choose.outcomes:
        expected = [log_likelihood(ids_of(outcome), choice) for choice in outcome.example.choices]
        assert outcome.record["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    for outcome in text.outcomes:
        expected = log_likelihood(ids_of(outcome), outcome.example.answer)
        assert outcome.record["log_likelihood"] == pytest.approx(expected, abs=1e-4)
    for outcome in write.outcomes:
        before = ids_of(outcome)
        after = twin.generate(before, max_new_tokens=6, do_sample=False)[0, before.shape[1] :]
        assert outcome.record["generated"] == reference.decode(after, skip_special_tokens=True)


def test_all_tasks_can_be_asked_as_chat(chat_folder: Path, tasks: Path) -> None:
    tasks.write_text(tasks.read_text().replace(", chat: true", "").replace("chat: true, ", ""))
    assert not any(task.chat for task in read_tasks(tasks))
    asked = evaluate_tasks(chat_folder.parent / "checkpoint", tasks, chat=True)
    assert all("messages" in outcome.record for result in asked for outcome in result.outcomes)
    plain = evaluate_tasks(chat_folder.parent / "checkpoint", tasks)
    assert all("prompt" in outcome.record for result in plain for outcome in result.outcomes)
    assert plain[1].metrics["loss"].value != asked[1].metrics["loss"].value


def test_what_cannot_be_asked_is_told(chat_folder: Path, finished_run: Path, tasks: Path) -> None:
    with pytest.raises(ConfigError, match="without a chat template"):
        evaluate_tasks(finished_run, tasks)
    text = tasks.read_text()
    tasks.write_text(text.replace('prompt: "{{ q }}"', 'prompt: "{{ q }} <|eot_id|>"'))
    with pytest.raises(DataError, match=r"Task choose, row 0: .*control token <\|eot_id\|>"):
        evaluate_tasks(chat_folder.parent / "checkpoint", tasks)
    tasks.write_text(text.replace('perplexity, path: PATH, prompt: "{{ q }}"', "perplexity"))
    tasks.write_text(text.replace('prompt: "{{ q }}"', 'prompt: ""'))
    with pytest.raises(ConfigError, match="user's message, which may not be empty"):
        evaluate_tasks(chat_folder.parent / "checkpoint", tasks)

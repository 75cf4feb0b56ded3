"""EleutherAI's lm-evaluation-harness gives our checkpoint the scores that it gives the export by its own model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.train.convert import export_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS = [
    {"q": "The statement", "choices": ["is executed", "eats grass"], "gold": 0},
    {"q": "A class ", "choices": ["definition", "of wine"], "gold": 0},
    {"q": "", "choices": ["The import", "expression"], "gold": 1},
]
TASK = """
task: KIND_task
dataset_path: json
dataset_kwargs: {data_files: {test: "PATH"}}
test_split: test
output_type: KIND
doc_to_text: "{{q}}"
"""
ENDS = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n",
    "generate_until": 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]\n",
    "loglikelihood_rolling": 'doc_to_target: "{{choices[0]}}"\nmetric_list: [{metric: bits_per_byte}]\n',
}


def test_the_harness_scores_as_on_the_export(finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    export_checkpoint(finished_run, tmp_path / "hf")
    for ours, theirs in answers(finished_run, tmp_path / "hf", tmp_path, list(ENDS)):
        assert_equal(ours, theirs)


def test_the_harness_asks_by_the_chat_template(chat_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    kinds, settings = ["multiple_choice", "generate_until"], {"apply_chat_template": True, "num_fewshot": 1}
    for ours, theirs in answers(chat_folder.parent / "checkpoint", chat_folder, tmp_path, kinds, **settings):
        assert ours["arguments"] == theirs["arguments"]
        assert "<|assistant|>" in str(ours["arguments"])
        assert_equal(ours, theirs)


def answers(
    checkpoint: Path, exported: Path, folder: Path, kinds: list[str], **settings: Any
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each example: what the harness has of ours on the checkpoint, and of its own model on the export."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatrain.tasks.harness import HarnessModel

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    for kind in kinds:
        text = TASK.replace("KIND", kind).replace("PATH", str(folder / "rows.jsonl")) + ENDS[kind]
        (folder / f"{kind}.yaml").write_text(text)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"{kind}_task" for kind in kinds]
    found = [
        lm_eval.simple_evaluate(
            model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **settings
        )
        for model in (
            HarnessModel(str(checkpoint)),
            HFLM(str(exported), dtype="float32", batch_size=1, device="cpu"),
        )
    ]
    for name in names:
        yield from zip(*(each["samples"][name] for each in found), strict=True)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert str(ours["target"]) == str(theirs["target"])
    for one, other in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
        if isinstance(one, tuple | list):
            assert one[0] == pytest.approx(other[0], abs=1e-3)
            assert one[1] == other[1]
        elif isinstance(one, str):
            assert one == other
        else:
            assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("given", "code", "told"), [("checkpoint=absent", 4, "absent"), ("chekpoint=x", 2, "checkpoint=")]
)
def test_a_wrong_checkpoint_is_a_short_error(given: str, code: int, told: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    task = TASK.replace("KIND", "multiple_choice").replace("PATH", str(tmp_path / "rows.jsonl"))
    (tmp_path / "task.yaml").write_text(task + ENDS["multiple_choice"])
    command = [sys.executable, "-m", "megatrain.tasks.harness", "run", "--model", "megatrain", "--model_args", given]
    options = ["--tasks", "multiple_choice_task", "--include_path", str(tmp_path)]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert told in ended.stderr.splitlines()[-1]

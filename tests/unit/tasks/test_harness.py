"""EleutherAI's lm-evaluation-harness gives our checkpoint the scores that it gives the export by its own model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from megatrain.tasks.harness import HarnessModel

    export_checkpoint(finished_run, tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    for kind, end in ENDS.items():
        text = TASK.replace("KIND", kind).replace("PATH", str(tmp_path / "rows.jsonl")) + end
        (tmp_path / f"{kind}.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = [f"{kind}_task" for kind in ENDS]
    found = [
        lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
        for model in (
            HarnessModel(str(finished_run)),
            HFLM(str(tmp_path / "hf"), dtype="float32", batch_size=1, device="cpu"),
        )
    ]
    for name in names:
        ours, theirs = (each["samples"][name] for each in found)
        for mine, their in zip(ours, theirs, strict=True):
            assert str(mine["target"]) == str(their["target"])
            for one, other in zip(mine["filtered_resps"], their["filtered_resps"], strict=True):
                if isinstance(one, tuple | list):
                    assert one[0] == pytest.approx(other[0], abs=1e-3)
                    assert one[1] == other[1]
                elif isinstance(one, str):
                    assert one == other
                else:
                    assert one == pytest.approx(other, abs=1e-3)


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

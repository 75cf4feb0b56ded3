"""train.tasks: answered while a run trains, with the figures of `eval --tasks` on its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatrain.config import RunConfig
from megatrain.errors import ConfigError, DataError
from megatrain.observe.metrics import read_lines
from megatrain.observe.report import write_report
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.train import preview
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

ROWS = [{"q": "The statement", "a": "is executed"}, {"q": "A class", "a": "definition"}, {"q": "An", "a": "object"}]
TASKS = """
- {name: choose, kind: choices, path: PATH, prompt: "{{ q }}", answer: "0", choices: ["{{ a }}", "of wine"], shots: 1}
- {name: text, kind: perplexity, path: PATH, prompt: "{{ q }}", answer: "{{ a }}"}
- {name: write, kind: generate, path: PATH, prompt: "{{ q }}", answer: "{{ a }}", max_new_tokens: 3}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks.yaml").write_text(TASKS.replace("PATH", str(tmp_path / "rows.jsonl")))
    return tmp_path / "tasks.yaml"


def figures(run_dir: Path) -> dict[int, Any]:
    return {line["step"]: line["tasks"] for line in read_lines(run_dir) if "tasks" in line}


def test_figures_are_those_of_the_checkpoints(
    tasks: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    run_dir, train = tmp_path / "run", {"steps": 6, "eval_every_steps": 2, "tasks": str(tasks)}
    config = tiny_config(tiny_data, run_dir, train=train, checkpoint={"every_steps": 2}, observe={"tensorboard": True})
    file = write_config(tmp_path / "run.yaml", config)
    two_ranks.finish(file, "train.steps=4")
    before = figures(run_dir)
    two_ranks.finish(file, "checkpoint.keep=9")
    found = figures(run_dir)
    assert list(found) == [2, 4, 6]
    assert {step: found[step] for step in before} == before
    for step, of_step in found.items():
        results = evaluate_tasks(run_dir / "checkpoints" / f"step-{step:08d}", tasks)
        assert [result.task.name for result in results] == list(of_step)
        for result in results:
            for name, metric in result.metrics.items():
                shown = of_step[result.task.name][name]
                assert shown["value"] == pytest.approx(metric.value, rel=1e-4), (step, name)
                assert shown["stderr"] == pytest.approx(metric.stderr, rel=1e-3, abs=1e-6)
                assert shown["n"] == metric.n
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("tasks/choose/acc")] == [2, 4, 6]
    write_report(run_dir, tmp_path / "report.html")
    assert "after step 6" in (tmp_path / "report.html").read_text()


def test_tasks_that_cannot_be_asked_fail_early(
    tasks: Path, tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    """The data came without a chat template: the first step is not begun."""
    tasks.write_text(tasks.read_text().replace("kind: generate", "kind: generate, chat: true"))
    train = {"steps": 6, "eval_every_steps": 6, "tasks": str(tasks)}
    ended = two_ranks.train(write_config(tmp_path / "c.yaml", tiny_config(tiny_data, tmp_path / "run", train=train)))
    assert ended.codes == [2, 2]
    assert "The model came without a chat template" in "".join(ended.output)
    assert "step 1" not in "".join(ended.output)


def test_a_wrong_file_of_tasks_fails_early(tasks: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    def check(path: Path, must_exist: bool = False) -> list[str]:
        config = tiny_config(tiny_data, tmp_path / "run")
        config["train"] = {**config["train"], "tasks": str(path)}
        return preview.check_tasks(RunConfig.model_validate(config), must_exist)

    assert check(tasks) == ["train.tasks: choose (3 examples), text (3 examples), write (3 examples)."]
    assert "is not here" in check(tmp_path / "absent.yaml")[0]
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        check(tmp_path / "absent.yaml", must_exist=True)
    tasks.write_text(tasks.read_text().replace("{{ q }}", "{{ question }}"))
    with pytest.raises(DataError, match=r"Task choose, row 0 of .*question"):
        check(tasks)

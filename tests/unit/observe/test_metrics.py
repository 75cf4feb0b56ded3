import json
from pathlib import Path

import pytest

from megatrain.observe.metrics import LossTrend, MetricsWriter

INTERFACE_KEYS = {"step", "tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second", "mfu", "skipped"}


def read(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_line_has_the_interfaces_keys(tmp_path, make_step):
    writer = MetricsWriter(tmp_path)
    writer.step(make_step(1))
    [line] = read(tmp_path)
    assert line.keys() >= INTERFACE_KEYS
    assert (line["step"], line["tokens"], line["loss"]) == (1, 2048, 8.99)
    assert sum(line["parts"].values()) == line["step_seconds"]
    writer.close()


def test_unknown_or_infinite_figures_are_null(tmp_path, make_step):
    writer = MetricsWriter(tmp_path)
    writer.step(make_step(1, loss=float("nan"), grad_norm=float("inf"), mfu=None))
    writer.validation(1, float("-inf"), 0.1)
    step, validation = read(tmp_path)
    assert step["loss"] is step["grad_norm"] is step["mfu"] is None
    assert validation["validation_loss"] is None
    writer.close()


def test_a_resume_keeps_each_step_once_and_events(tmp_path, make_step):
    first = MetricsWriter(tmp_path)
    first.event("start", 0)
    for step in range(1, 8):
        first.step(make_step(step, loss=1.0))
        if step % 2 == 0:
            first.validation(step, 3.0, 0.1)
    first.event("save", 6)
    first.close()

    second = MetricsWriter(tmp_path, resume_step=4)
    assert second.num_dropped_steps == 3
    second.event("resume", 4)
    for step in range(5, 9):
        second.step(make_step(step, loss=2.0))
    second.close()

    lines = read(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert losses == {step: 1.0 if step <= 4 else 2.0 for step in range(1, 9)}
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert [line["event"] for line in lines if "event" in line] == ["start", "save", "resume"]


def test_a_torn_line_is_dropped_alone(tmp_path, make_step):
    first = MetricsWriter(tmp_path)
    first.step(make_step(1))
    first.step(make_step(2))
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])

    second = MetricsWriter(tmp_path, resume_step=1)
    second.step(make_step(2))
    second.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_unwritable_run_folder_stops_nothing(tmp_path, make_step):
    (tmp_path / "run").write_text("a file where the run folder should be")
    writer = MetricsWriter(tmp_path / "run")
    writer.step(make_step(1))
    (tmp_path / "run").unlink()
    writer.step(make_step(2))
    writer.close()
    assert [line["step"] for line in read(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([10.8, 55.0, 1414.2], "it diverged: the loss was 10.8 at first and is 1,414 in the end"),
        ([5.0, 4.0, float("nan")], "it diverged: the loss is not finite in the end"),
        ([6.24, 6.23, 6.26], None),  # a short run's noise
        ([6.0] + [2.0] * 30 + [9.0], None),  # one step that leaps out
        ([6.0] + [2.0] * 30 + [7.0] * 10, "it diverged: the loss was 6 at first and is 7 in the end"),
    ],
)
def test_a_loss_above_its_first_has_diverged(losses, words, tmp_path, make_step):
    writer, half = MetricsWriter(tmp_path), len(losses) // 2
    for step, loss in enumerate(losses[:half], 1):
        writer.step(make_step(step, loss=loss))
    resumed = MetricsWriter(tmp_path, half)
    for step, loss in enumerate(losses[half:], half + 1):
        resumed.step(make_step(step, loss=loss))
    whole = LossTrend()
    for loss in losses:
        whole.add(loss)
    assert resumed.trend.divergence() == whole.divergence() == words

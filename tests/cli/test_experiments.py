"""Several runs: `megatrain sweep` trains them, `megatrain runs` shows them side by side."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatrain.checkpoint.manifest import read_manifest
from megatrain.config import dump
from megatrain.experiments import sweep
from megatrain.experiments.runs import RunSummary, show, summarize
from tests.cli.conftest import Megatrain
from tests.runs import TinyData, tiny_config, wait_until, write_config

AXES = ("optimizer.lr=1e-3,3e-3", "optimizer.betas=[0.9,0.95]")


@pytest.fixture
def config(tiny_data: TinyData, tmp_path: Path) -> Path:
    sections = {"train": {"steps": 2, "eval_batches": 1}, "checkpoint": {"every_steps": 2}}
    return write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "runs", **sections))


def test_a_sweep_is_every_combination_of_values(config: Path, tmp_path: Path) -> None:
    found = sweep.points(str(config), [*AXES, "model.hidden_size=16,32", "train.steps=3"])
    assert [point.name for point in found] == [
        f"lr={lr},hidden_size={size}" for lr in ("1e-3", "3e-3") for size in (16, 32)
    ]
    assert found[0].run_dir == tmp_path / "runs" / "lr=1e-3,hidden_size=16"
    assert found[0].config.train.steps == 3
    assert "optimizer.betas=[0.9,0.95]" in found[0].overrides
    nested = sweep.points(str(config), ["optimizer.lr=1,2", "train.global_batch_size=[[0,8],[4096,16]]"])
    assert [point.name for point in nested] == ["lr=1", "lr=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=3"], "A sweep needs a key with several values"),
        (["optimizer.lr=1e-3,fast"], "optimizer.lr=fast"),
        (["optimizer.lr=1e-3,1e-3"], "the same"),
        (["optimizer.lr=1e-3,3e-3,0.001"], "are the same, lr=1e-3 and lr=0.001"),
        (["run.dir=a,b", "optimizer.lr=1,2"], "run.dir is the folder of all runs"),
    ],
)
def test_a_sweep_is_refused_before_a_run(
    overrides: list[str], message: str, config: Path, megatrain: Megatrain, tmp_path: Path
) -> None:
    ended = megatrain("sweep", config, *overrides)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_trains_and_compares_all(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatrain", "sweep", str(config), "optimizer.lr=1e-3,3e-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    found = summarize(tmp_path / "runs")
    assert {run.run: (run.state, run.step, run.lr) for run in found} == {
        "lr=1e-3": ("finished", 2, 1e-3),
        "lr=3e-3": ("finished", 2, 3e-3),
    }
    assert all(run.run in done.stdout.splitlines()[-1] + done.stdout.splitlines()[-2] for run in found)
    shutil.rmtree(tmp_path / "runs" / "lr=3e-3")
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert again.stdout.count("has ended before") == 1
    assert len(summarize(tmp_path / "runs")) == 2


@pytest.mark.slow
def test_a_sweep_asked_to_stop_saves_first(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatrain", "sweep", str(config), "optimizer.lr=1e-3,3e-3", "train.steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as task:
        metrics = tmp_path / "runs" / "lr=1e-3" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and b'"loss"' in metrics.read_bytes())
        task.send_signal(signal.SIGTERM)
        assert task.wait(timeout=100) == 75
    assert [(run.run, run.state) for run in summarize(tmp_path / "runs")] == [("lr=1e-3", "stopped")]


def test_runs_are_shown_side_by_side(finished_run: Path, tmp_path: Path, megatrain: Megatrain) -> None:
    for name, lr in (("first", "0.001"), ("deep/second", "0.003")):
        shutil.copytree(finished_run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        path = tmp_path / name / "config.yaml"
        path.write_text(path.read_text().replace("lr: 0.001", f"lr: {lr}"))
    lines = (tmp_path / "first" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "first" / "metrics.jsonl").write_text(
        "".join(lines[:-1]) + json.dumps({"step": 6, "validation_loss": 0.5, "time": 0.0}) + '\n{"torn'
    )
    ended = megatrain("runs", tmp_path, "--json")
    first, second = json.loads(ended.out)
    assert (first["run"], first["state"], first["validation_loss"], first["best_step"]) == ("first", "ended", 0.5, 6)
    assert (second["run"], second["state"], second["step"]) == ("deep/second", "finished", 6)
    assert first["differs"] == {"optimizer.lr": 0.001}
    assert [row["run"] for row in json.loads(megatrain("runs", tmp_path, "--json", "--sort", "run").out)] == [
        "deep/second",
        "first",
    ]
    shown = megatrain("runs", tmp_path).out.splitlines()
    assert "best validation" in shown[0]
    assert [line.split()[:3] for line in shown[1:]] == [["first", "ended", "6/6"], ["deep/second", "finished", "6/6"]]


def test_damaged_metrics_are_shown_as_unknown(finished_run: Path, tmp_path: Path, megatrain: Megatrain) -> None:
    for name in ("one", "other"):
        shutil.copytree(finished_run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    with (tmp_path / "one" / "metrics.jsonl").open("a") as lines:
        lines.write(
            '{"step": 6, "loss": "x", "time": []}\n{"step": 6, "validation_loss": {}, "validation_losses": 3}\n'
        )
        lines.write('{"step": 6, "event": 7}\n{"step": true, "loss": 1.0}\n')
    one, other = json.loads(megatrain("runs", tmp_path, "--json", "--sort", "run").out)
    assert (one["loss"], one["validation_loss"], one["state"]) == (None, None, "ended")
    assert (other["step"], other["state"]) == (6, "finished")
    assert megatrain("runs", tmp_path).code == 0
    assert megatrain("report", tmp_path / "one", tmp_path / "other", "--out", tmp_path / "page.html").code == 0


def test_many_differences_fit_a_narrow_terminal() -> None:
    differs = {f"section.a_long_name_of_a_key_{k}": k for k in range(12)}
    runs = [
        RunSummary(f"sweep/run-{number}", "finished", 200, 200, 3.5, 3.25, 150, 1e-3, differs) for number in range(3)
    ]
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, no_color=True)
    show(runs, console)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["sweep/run-0", "finished", "200/200", "3.5000", "3.2500", "150", "0.001"]
    assert lines[5].split() == ["run", "what", "differs"]
    assert lines[6].startswith("sweep/run-0  section.a_long_name_of_a_key_0=0 ")


def test_an_early_stopped_run_has_ended(config: Path, tmp_path: Path) -> None:
    early = "train.early_stopping={patience: 2}"

    def ended(*overrides: str) -> bool:
        return sweep.has_ended(sweep.points(str(config), ["optimizer.lr=1,2", "train.steps=9", *overrides])[0])

    point = sweep.points(str(config), ["optimizer.lr=1,2", "train.steps=9", early])[0]
    point.run_dir.mkdir(parents=True)
    (point.run_dir / "config.yaml").write_text(dump(point.config))
    (point.run_dir / "metrics.jsonl").write_text('{"step": 4, "event": "finish"}\n')
    assert ended(early)
    assert not ended("train.early_stopping={patience: 3}")
    assert not ended(early, "train.steps=10")
    (point.run_dir / "metrics.jsonl").write_text('{"step": 9, "event": "finish"}\n')
    assert ended()
    (point.run_dir / "metrics.jsonl").write_text('{"step": 4, "event": "stop"}\n')
    assert not ended(early)


def test_a_folder_without_runs_is_refused(tmp_path: Path, megatrain: Megatrain) -> None:
    ended = megatrain("runs", tmp_path)
    assert ended.code == 3
    assert "has no run in it" in ended.err
    ended = megatrain("runs", tmp_path / "nowhere")
    assert ended.code == 3
    assert "There is no folder" in ended.err


def test_best_exports_the_lowest_validation_loss(finished_run: Path, tmp_path: Path, megatrain: Megatrain) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    fourth = run_dir / "checkpoints" / "step-00000004"
    lower = read_manifest(fourth).model_copy(update={"validation_loss": 0.001})
    (fourth / "manifest.json").write_bytes(lower.encode())
    ended = megatrain("export", run_dir, "--out", tmp_path / "hf", "--best")
    assert (ended.code, f"is {fourth} for transformers" in ended.out) == (0, True)
    for step in (2, 4, 6):
        folder = run_dir / "checkpoints" / f"step-{step:08}"
        unknown = read_manifest(folder).model_copy(update={"validation_loss": None})
        (folder / "manifest.json").write_bytes(unknown.encode())
    ended = megatrain("eval", run_dir, "--data", tmp_path, "--best")
    assert ended.code == 4
    assert "no good checkpoint with a validation loss" in ended.err


def test_several_runs_are_reported_on_one_page(finished_run: Path, tmp_path: Path, megatrain: Megatrain) -> None:
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for run_dir, lr in zip(runs, ("0.001", "0.003"), strict=True):
        shutil.copytree(finished_run, run_dir, ignore=shutil.ignore_patterns("checkpoints"))
        (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("lr: 0.001", f"lr: {lr}"))
    with (runs[1] / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 6, "validation_loss": 0.5, "validation_losses": {"x": 0.4, "<y>": 0.6}}) + "\n")
    ended = megatrain("report", *runs, "--out", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    page = (tmp_path / "page.html").read_text()
    rows = re.findall(r"&#9632;</span> (\S+?)</td>", page)
    assert rows == ["b/run", "a/run"]  # the best validation loss first
    assert "<th>optimizer.lr</th>" in page and "<td>0.003</td>" in page
    assert "Chart: Validation loss, &lt;y&gt;" in page and "<y>" not in page
    assert re.search(r"<td>Validation loss</td><td>b/run</td><td class=\"number\">0.5000</td>", page)
    assert megatrain("report", *runs, "--out", tmp_path / "page.png").code == 2
    assert megatrain("report", runs[0], runs[0]).code == 2

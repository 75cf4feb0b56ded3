"""Trackers, with the real packages, in their offline modes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.config import dump, load
from megatrain.errors import ConfigError
from megatrain.observe import trackers
from megatrain.observe.observers import Observers
from megatrain.train import preview
from tests.runs import TinyData, tiny_config, wait_until, write_config
from tests.served import ServedRanks
from tests.unit.observe.conftest import MakeStep

MlflowClient = pytest.importorskip("mlflow").MlflowClient
RunStatus = pytest.importorskip("mlflow.entities").RunStatus
Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def mlflow_reads_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def run_dir(tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that is about to start, with no account and no server of a tracker."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where an account of whoever runs this would be
    return _record_config(tiny_data, tmp_path / "run", lr=1e-3)


def _record_config(tiny_data: TinyData, run_dir: Path, lr: float) -> Path:
    config = tiny_config(tiny_data, run_dir, optimizer={"lr": lr})
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump(load(write_config(run_dir.parent / "c.yaml", config))))
    return run_dir


def _wandb_records(path: Path) -> Iterator[Any]:
    """Those of a .wandb file, which is a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, in which each piece
    of a record has a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            yield Record.FromString(whole)


def _wandb_starts(run_dir: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]], int]]:
    """Of each start its run's id, its config, its rows and its exit code, as wandb recorded them."""
    starts = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run_id, config, rows, code = "", {}, [], -1
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run_id = record.run.run_id
            if kind in ("run", "config"):
                update = record.run.config.update if kind == "run" else record.config.update
                config |= {item.key: json.loads(item.value_json) for item in update}
            if kind == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
            if kind == "exit":
                code = record.exit.exit_code
        starts.append((run_id, config, rows, code))
    return starts


def _steps_at_mlflow(run_dir: Path, name: str = "train/loss") -> list[int]:
    client = MlflowClient((run_dir / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("megatrain").experiment_id])
    return [each.step for each in client.get_metric_history(run.info.run_id, name)]


def _log(run_dir: Path, make_step: MakeStep, steps: range, end: str = "finish", **options: Any) -> None:
    resume_step = steps[0] - 1
    with Observers(run_dir, 8, resume_step, tensorboard=False, **options) as observers:
        observers.start({})
        for step in steps:
            observers.step(make_step(step, mfu=None))
        observers.validation(steps[-1], 3.5, 0.1, {"code": 3.0, "prose": 4.0})
        observers.end(end, steps[-1], "why")


@pytest.mark.slow
def test_wandb_gets_a_run_across_its_starts(
    run_dir: Path, tiny_data: TinyData, make_step: MakeStep, caplog: pytest.LogCaptureFixture
) -> None:
    _log(run_dir, make_step, range(1, 5), "stop", trackers=["wandb"])
    _record_config(tiny_data, run_dir, lr=5e-4)
    _log(run_dir, make_step, range(3, 7), trackers=["wandb"])
    first, second = _wandb_starts(run_dir)
    assert first[0] == second[0] == json.loads((run_dir / "tracker-wandb.json").read_bytes())["id"]
    assert (first[1]["optimizer.lr"], second[1]["optimizer.lr"]) == (1e-3, 5e-4)
    for (_, _, rows, code), steps in ((first, [1, 2, 3, 4]), (second, [3, 4, 5, 6])):
        assert [row["step"] for row in rows] == [*steps, steps[-1]]
        assert [row["train/loss"] for row in rows[:-1]] == [9.0 - step / 100 for step in steps]
        assert (rows[-1]["validation/loss"], rows[-1]["validation_loss/code"], code) == (3.5, 3.0, 0)
    told = [text for text in caplog.messages if "wandb" in text]
    assert len(told) == 2  # once a start
    assert all("No API key" in text and "wandb sync" in text for text in told)


@pytest.mark.slow
def test_mlflow_gets_a_run_across_its_starts(run_dir: Path, tiny_data: TinyData, make_step: MakeStep) -> None:
    _log(run_dir, make_step, range(1, 5), "stop", trackers=["mlflow"])
    _record_config(tiny_data, run_dir, lr=5e-4)
    _log(run_dir, make_step, range(3, 7), trackers=["mlflow"])
    client = MlflowClient((run_dir / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("megatrain").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.tags["optimizer.lr from step 2"] == "0.0005"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [each.step for each in losses] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert {each.value for each in losses if each.step == 3} == {8.97}
    assert run.data.metrics["validation/loss"] == 3.5


def test_a_step_logged_after_its_validation_is_sent(run_dir: Path, make_step: MakeStep) -> None:
    with Observers(run_dir, 8, tensorboard=False, trackers=["mlflow"]) as observers:
        observers.start({})
        observers.step(make_step(1))
        observers.validation(2, 3.5, 0.1)  # as the trainer does, before the step's own line
        wait_until(lambda: list(run_dir.glob("mlruns/*/*/metrics/validation/loss")))
        observers.step(make_step(2))
        observers.end("finish", 2, "why")
    assert _steps_at_mlflow(run_dir) == [1, 2]


def test_a_tracker_added_late_gets_all_steps(run_dir: Path, make_step: MakeStep) -> None:
    _log(run_dir, make_step, range(1, 5))
    _log(run_dir, make_step, range(5, 7), trackers=["mlflow"])
    assert _steps_at_mlflow(run_dir) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_server_that_is_gone_is_told_once(
    run_dir: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    _log(run_dir, make_step, range(1, 5), trackers=["mlflow"])
    (told,) = [text for text in caplog.messages if "what is missing is sent when it can be" in text]
    assert "API request" in told
    assert len((run_dir / "metrics.jsonl").read_bytes().splitlines()) == 7
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    _log(run_dir, make_step, range(5, 7), trackers=["mlflow"])
    assert _steps_at_mlflow(run_dir) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.acceptance
def test_wandb_without_network_records_the_run(
    run_dir: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", UNREACHABLE)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 120.0)  # it waits 20 s for the server
    _log(run_dir, make_step, range(1, 5), trackers=["wandb"])
    ((_, _, rows, code),) = _wandb_starts(run_dir)
    assert ([row["step"] for row in rows], code) == ([1, 2, 3, 4, 4], 0)
    assert len([text for text in caplog.messages if "connection refused" in text or "wandb sync" in text]) == 1


def test_a_tracker_that_hangs_never_holds_up_steps(
    run_dir: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reads nothing, and does not end by itself.
    monkeypatch.setattr(trackers, "FEEDER", [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    began = time.monotonic()
    _log(run_dir, make_step, range(1, 2000), trackers=["wandb"])
    assert time.monotonic() - began < 20.0
    assert "has not got everything" in caplog.text


def test_a_missing_package_is_told_and_no_obstacle(
    run_dir: Path, make_step: MakeStep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir.parent / "wandb.py").write_text("raise ModuleNotFoundError('', name='wandb')")
    monkeypatch.setenv("PYTHONPATH", str(run_dir.parent))
    _log(run_dir, make_step, range(1, 5), trackers=["wandb"])
    assert [text for text in caplog.messages if "pip install 'megatrain[wandb]'" in text]


def test_a_missing_package_is_refused_before_a_start(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(run_dir / "config.yaml", ["observe.trackers=[wandb, mlflow]"])
    assert preview.check_trackers(config, must_exist=True) == []
    monkeypatch.setattr(preview, "find_spec", {"wandb": "there"}.get)
    (note,) = preview.check_trackers(config)
    assert note == "observe.trackers: mlflow not installed here: pip install 'megatrain[mlflow]'."
    with pytest.raises(ConfigError, match="mlflow not installed"):
        preview.check_trackers(config, must_exist=True)


def test_a_tracker_ends_with_its_killed_run(run_dir: Path, make_step: MakeStep) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
from megatrain.observe.observers import Observers
from megatrain.train import preview
from megatrain.observe.metrics import StepMetrics
observers = Observers(Path({str(run_dir)!r}), 8, 0, False, trackers=["mlflow"])
observers.start({{}})
observers.step(StepMetrics({", ".join(f"{k}={v!r}" for k, v in vars(make_step(1)).items())}))
observers.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    failed = f"status: {RunStatus.FAILED}"  # in the file, as what is being written cannot be read as a run
    wait_until(lambda: any(failed in path.read_text() for path in run_dir.glob("mlruns/*/*/meta.yaml")))
    assert _steps_at_mlflow(run_dir) == [1]


def test_a_training_run_feeds_its_trackers(tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path) -> None:
    observe = {"tensorboard": False, "trackers": ["mlflow"]}
    sections = {"train": {"steps": 4, "eval_every_steps": 2, "eval_batches": 1}, "observe": observe}
    one_rank.finish(write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections)))
    assert _steps_at_mlflow(tmp_path / "run") == [1, 2, 3, 4]
    assert _steps_at_mlflow(tmp_path / "run", "validation/loss") == [2, 4]

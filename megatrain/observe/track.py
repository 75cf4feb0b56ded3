"""`python -m megatrain.observe.track NAME RUN STEP`: sends a run's figures to a tracker as RUN/metrics.jsonl grows.

Started by a run's rank 0 (`trackers.py`), it ends when its standard input does, once all is sent. What a user has to
know it prints, once; what libraries print goes to standard error, which is a log.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from megatrain.atomic import commit_bytes
from megatrain.config import load
from megatrain.config.keys import flat
from megatrain.distributed.signals import SAVE_SIGNAL, STOP_SIGNALS
from megatrain.observe.figures import figures_of
from megatrain.observe.metrics import METRICS_FILE, parse_line
from megatrain.observe.record import CONFIG_FILE

if TYPE_CHECKING:
    from mlflow import MlflowClient

Tell = Callable[[str], object]

POLL_SECONDS, MAX_WAIT_SECONDS = 1.0, 60.0
MAX_BATCH = 500
NOT_SENT = 1  # exit code


class Row(NamedTuple):
    """The figures of one line of metrics.jsonl; ``time``: in seconds since 1970."""

    step: int
    time: float
    figures: Mapping[str, float]


class Tracker(Protocol):
    """A run at a service. Each method raises whatever its library does."""

    @staticmethod
    def new_id(run_dir: Path) -> str:
        """Of a run that the service does not know yet."""

    def __init__(self, run_dir: Path, run_id: str, config: Mapping[str, Any], step: int, tell: Tell) -> None:
        """The run of ``run_id``, which trains with ``config`` from ``step`` on."""

    def log(self, rows: Sequence[Row]) -> None: ...

    def close(self, end: str | None) -> None:
        """``end``: the event that the run ended with: finish, stop, diverged, or None: it says of none."""


class WandbTracker:
    """Weights & Biases. Without an API key or a server that answers, it writes to RUN/wandb, for `wandb sync`."""

    @staticmethod
    def new_id(run_dir: Path) -> str:
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def __init__(self, run_dir: Path, run_id: str, config: Mapping[str, Any], step: int, tell: Tell) -> None:
        import wandb

        given: dict[str, Any] = {"id": run_id, "resume": "allow", "dir": str(run_dir), "config": dict(config)}
        given |= {"project": os.environ.get("WANDB_PROJECT", "megatrain"), "name": run_dir.name}
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=20)
        try:
            run: Any = wandb.init(**given, settings=settings)
        except (wandb.Error, OSError) as error:
            reason = str(error).splitlines()[0]
            tell(f"{reason} The run is recorded in {run_dir}/wandb; `wandb sync {run_dir}/wandb/*run-*` uploads it.")
            wandb.teardown()  # which else holds on to the run's id
            run = wandb.init(**given, settings=settings, mode="offline")
        run.config.update(dict(config), allow_val_change=True)
        # An axis of our own: wandb's refuses steps that are made again.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._run = run

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"step": row.step, **row.figures})

    def close(self, end: str | None) -> None:
        self._run.finish(exit_code=0 if end in ("finish", "stop") else 1)


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI; without it in the folder RUN/mlruns."""

    _STATUS: Mapping[str | None, str] = {"finish": "FINISHED", "stop": "KILLED"}

    @staticmethod
    def new_id(run_dir: Path) -> str:
        client = _mlflow_client(run_dir)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatrain")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        return str(client.create_run(experiment_id, run_name=run_dir.name).info.run_id)

    def __init__(self, run_dir: Path, run_id: str, config: Mapping[str, Any], step: int, tell: Tell) -> None:
        from mlflow.entities import Param, RunTag

        self._id, self._client = run_id, _mlflow_client(run_dir)
        client = self._client
        client.update_run(run_id, status="RUNNING")
        values = {key: str(value)[:6000] for key, value in config.items()}
        known = client.get_run(run_id).data.params  # which MLflow does not let change
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):
            client.log_batch(run_id, params=new[start : start + 100])
        changed = {key: value for key, value in values.items() if known.get(key, value) != value}
        client.log_batch(
            run_id, tags=[RunTag(f"{key} from step {step}", value) for key, value in list(changed.items())[:100]]
        )

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        found = [
            Metric(name, value, int(row.time * 1000), row.step) for row in rows for name, value in row.figures.items()
        ]
        for start in range(0, len(found), 1000):
            self._client.log_batch(self._id, metrics=found[start : start + 1000])

    def close(self, end: str | None) -> None:
        self._client.set_terminated(self._id, self._STATUS.get(end, "FAILED"))


def _mlflow_client(run_dir: Path) -> MlflowClient:
    # This process tries again by itself, and must end soon once the run does.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = (run_dir / "mlruns").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient()


TRACKERS: Mapping[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


class Feed:
    """From RUN/metrics.jsonl to one tracker. RUN/tracker-NAME.json keeps the run's id there, and the last step sent."""

    def __init__(self, name: str, run_dir: Path, resume_step: int, tell: Tell) -> None:
        self._kind, self._run_dir, self._tell = TRACKERS[name], run_dir.resolve(), tell
        self._state = run_dir / f"tracker-{name}.json"
        saved = orjson.loads(self._state.read_bytes()) if self._state.exists() else {}
        self._id: str | None = saved.get("id")
        # What came after the step that is resumed from comes again.
        self._first_step = self._sent = min(saved.get("step", 0), resume_step)
        self._tracker: Tracker | None = None
        self._end: str | None = None

    def send(self, file: IO[bytes]) -> None:
        """All that the file has got since; where this raises, the file stands where what is not sent begins."""
        while True:
            begins = file.tell()
            lines = list(_whole_lines(file))
            if not lines:
                return
            try:
                self._send(lines)
            except BaseException:
                file.seek(begins)
                raise

    def _send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        rows = [
            Row(line["step"], float(line.get("time") or 0.0), figures)
            for line in lines
            if line["step"] > self._first_step and (figures := figures_of(line))
        ]
        if rows:
            if self._tracker is None:
                self._tracker = self._open()
            self._tracker.log(rows)
            self._sent = rows[-1].step
        self._end = lines[-1].get("event")

    def _open(self) -> Tracker:
        if self._id is None:
            self._id = self._kind.new_id(self._run_dir)
            self.save()
        config = dict(flat(load(self._run_dir / CONFIG_FILE).model_dump(mode="json")))
        return self._kind(self._run_dir, self._id, config, self._first_step, self._tell)

    def close(self) -> None:
        if self._tracker is not None:
            self.save()
            self._tracker.close(self._end)

    def save(self) -> None:
        commit_bytes(self._state, orjson.dumps({"id": self._id, "step": self._sent}), single_writer=True)


def main(name: str, run_dir: Path, resume_step: int, tell: Tell) -> int:
    """Feed the tracker until standard input ends; NOT_SENT where it did not get everything."""
    for number in (*STOP_SIGNALS, SAVE_SIGNAL):
        signal.signal(number, signal.SIG_IGN)  # they are for the run, which ends this in its time
    feed, wait, is_told = Feed(name, run_dir, resume_step, tell), POLL_SECONDS, False
    with (run_dir / METRICS_FILE).open("rb") as file:
        while True:
            is_over = bool(select.select([sys.stdin], [], [], wait)[0])  # nothing is ever written there
            try:
                feed.send(file)
                wait = POLL_SECONDS
            except ModuleNotFoundError as error:
                tell(f"{error.name} is not installed: pip install 'megatrain[{name}]'. The run goes on without it.")
                return 0
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                traceback.print_exc()
                if not is_told:
                    tell(f"{_in_short(error)} The run goes on, and what is missing is sent when it can be.")
                is_told, wait = True, min(wait * 2, MAX_WAIT_SECONDS)
                if is_over:
                    return NOT_SENT
            if is_over:
                feed.close()
                return 0


def _whole_lines(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The next lines, MAX_BATCH at most, up to one that is being written."""
    for _ in range(MAX_BATCH):
        begins = file.tell()
        text = file.readline()
        if not text.endswith(b"\n"):
            file.seek(begins)
            return
        if (line := parse_line(text)) is not None:
            yield line


def _in_short(error: BaseException) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{first[:300]}{'' if first.endswith('.') else '.'}"


if __name__ == "__main__":
    told = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no message
    name, run_dir, resume_step = sys.argv[1:]
    sys.exit(main(name, Path(run_dir), int(resume_step), lambda text: os.write(told, f"{text}\n".encode())))

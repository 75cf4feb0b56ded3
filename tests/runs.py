"""Real runs for tests: a tiny config, `megatrain train` as a process of its own, and what it leaves."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml

TIMEOUT_SECONDS = 240.0
ACCEPTANCE = os.environ.get("MEGATRAIN_ACCEPTANCE") == "1"
"""Whether samples are whole, and tests marked `acceptance` run: `make acceptance`."""


class TinyData(NamedTuple):
    """Dataset folders, and the tokenizer that made them."""

    prose: Path
    code: Path
    held_out: Path
    tokenizer: Path


def tiny_config(data: TinyData, run_dir: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A config that trains in milliseconds a step; ``sections`` are laid over its own."""
    config: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "seed": 7},
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "train": [{"path": str(data.prose), "weight": 2.0}, {"path": str(data.code), "weight": 1.0}],
            "validation": [{"path": str(data.held_out)}],
            "seq_len": 64,
        },
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 1.0e-3},
        "schedule": {"type": "constant", "warmup_steps": 2},
        "checkpoint": {"every_steps": 5},
        "observe": {"tensorboard": False},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config


def finished_config(data: TinyData, run_dir: Path) -> dict[str, Any]:
    """The config of the run that tests look at and damage: six steps, checkpoints after 2, 4 and 6."""
    return tiny_config(data, run_dir, train={"steps": 6, "eval_batches": None}, checkpoint={"every_steps": 2})


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """The config as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    return path


class Metrics(NamedTuple):
    """What RUN/metrics.jsonl says, in the order of its lines."""

    steps: list[int]
    losses: list[float]
    norms: list[float]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, run_dir: Path) -> Metrics:
        """All whole lines; none where there is no file yet."""
        path = run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        steps = [line for line in lines if "loss" in line]
        return cls(
            [line["step"] for line in steps],
            [line["loss"] for line in steps],
            [line["grad_norm"] for line in steps],
            [line for line in lines if "event" in line],
        )


def last_step(run_dir: Path, since: float = 0.0) -> int | None:
    """The last step logged after ``since`` (seconds since 1970), by the end of metrics.jsonl; None without one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        begin = max(file.seek(0, os.SEEK_END) - 8192, 0)
        file.seek(begin)
        lines = file.read().splitlines(keepends=True)[1 if begin else 0 :]
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    steps = [line["step"] for line in whole if "loss" in line and line["time"] > since]
    return steps[-1] if steps else None


class TrainProcess:
    """`megatrain train` of a config, running."""

    def __init__(
        self, config: Path, num_ranks: int, *overrides: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._config = str(config)
        self.run_dir = Path(yaml.safe_load(config.read_text())["run"]["dir"])
        self.output_path = config.with_suffix(f".output-{len(list(config.parent.glob('*.output*')))}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "megatrain", "train", self._config, *overrides, "--procs", str(num_ranks)]
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that are up, by number."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if self._config in line and "megatrain.train" in line and "-m" in line:
                with contextlib.suppress(psutil.Error, KeyError):
                    found[int(process.environ()["RANK"])] = process
        return found

    def wait_for_step(self, step: int) -> None:
        """Until ``step`` has been logged."""
        wait_until(lambda: self.process.poll() is not None or step in Metrics.read(self.run_dir).steps, 0.002)
        assert self.process.poll() is None, f"it ended before step {step}:\n{self.output()}"

    def wait(self) -> tuple[int, str]:
        """Its exit code and all it printed, once it has ended."""
        return self.process.wait(TIMEOUT_SECONDS), self.output()

    def output(self) -> str:
        """What it and its ranks have printed so far."""
        return self.output_path.read_text(errors="replace")

    def send_all(self, number: int) -> None:
        """Send a signal to it and everything it has started."""
        for process in [self.process, *psutil.Process(self.process.pid).children(recursive=True)]:
            process.send_signal(number)

    def kill_all(self) -> None:
        """End it and whatever it left."""
        for process in [self.process, *self.ranks().values()]:
            process.send_signal(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], interval_seconds: float = 0.05) -> None:
    """Look again and again until the condition holds."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(interval_seconds)


def is_listening(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def die_with_parent() -> None:
    """On Linux this process is killed when its parent ends, however it does: ranks left alone would spin for ever."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

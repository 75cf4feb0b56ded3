"""What a run trained with: RUN/config.yaml, and beside it the config of each start that made a step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from megatrain.atomic import commit_bytes
from megatrain.config import RunConfig, dump
from megatrain.errors import ConfigError
from megatrain.observe.metrics import METRICS_FILE
from megatrain.observe.record import CONFIG_FILE, start_config_file, start_configs

logger = logging.getLogger(__name__)


def refuse_record_of_another_run(path: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError where ``path`` is what a run recorded, and leads elsewhere: that run was moved, or its run.dir
    is relative and this start stands in another folder. It would begin anew there without a word."""
    run_dir = path.resolve().parent
    if not (run_dir / METRICS_FILE).exists() or run_dir == Path(config.run.dir).resolve():
        return
    if not any(override.startswith("run.dir=") for override in overrides):
        raise ConfigError(
            f"{path} is the record of the run in {run_dir}, but its run.dir, {config.run.dir}, is another folder from "
            f"here. Add run.dir={run_dir} to go on with that run, or another run.dir to begin one."
        )


def record_new_run(config: RunConfig) -> None:
    """Before a run's first step: config.yaml, if there is none. What a run has trained with stays until it steps."""
    path = Path(config.run.dir) / CONFIG_FILE
    if not path.exists():
        _write(path, config)


def record_start(config: RunConfig, first_step: int) -> None:
    """Once a start has made its first step, from the state after ``first_step``: its config is the run's from there on.

    Those of starts from a later state go, as the lines of their steps in metrics.jsonl do: the run went back.
    """
    run_dir = Path(config.run.dir)
    for step, path in start_configs(run_dir).items():
        if step > first_step:
            with contextlib.suppress(OSError):
                path.unlink()
    _write(run_dir / start_config_file(first_step), config)
    _write(run_dir / CONFIG_FILE, config)


def _write(path: Path, config: RunConfig) -> None:
    """A disk that cannot take it does not stop the run."""
    try:
        commit_bytes(path, dump(config).encode(), single_writer=True)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the run goes on without it", path, error.strerror)

"""The runs below a folder side by side: how each is doing, its best validation, and what differs in their configs."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatrain.checkpoint.lock import is_alive
from megatrain.config import RunConfig, load
from megatrain.config.keys import flat
from megatrain.errors import ConfigError, DataError
from megatrain.observe.metrics import METRICS_FILE, last_num_steps, read_lines
from megatrain.observe.record import CONFIG_FILE

_ENDS = {"finish": "finished", "stop": "stopped", "diverged": "diverged"}
_OF_EACH_RUN = ("run.dir", "checkpoint.dir")
_IN_A_RUN = ("checkpoints", "logs", "tensorboard")
_WIDEST = 100_000
_MAX_THREADS = 32  # each waits for one holder's sign of life


class RunSummary(NamedTuple):
    """A run in figures; None: not known. ``run``: its folder below the one looked in. ``state``: running, finished,
    stopped, diverged, or ended: without saying why. ``loss``: of the last logged step. ``differs``: its values of the
    config's keys that are not the same in all runs."""

    run: str
    state: str
    step: int
    num_steps: int | None
    loss: float | None
    validation_loss: float | None
    best_step: int | None
    lr: float | None
    differs: Mapping[str, Any]


class Logged(NamedTuple):
    """What metrics.jsonl says of a run. ``best``: the lowest validation loss and its step. ``last_event``: None where
    a step came after it."""

    step: int
    loss: float | None
    best: tuple[float, int] | None
    last_event: str | None


SORTS: Mapping[str, Callable[[RunSummary], Any]] = {
    "validation_loss": lambda run: (run.validation_loss is None, run.validation_loss),
    "loss": lambda run: (run.loss is None, run.loss),
    "step": lambda run: -run.step,
    "run": lambda run: run.run,
}


def summarize(folder: Path, sort: str = "validation_loss") -> list[RunSummary]:
    """All runs in ``folder`` and below, in the order of SORTS[``sort``]. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    found = list(_find(folder))
    if not found:
        raise DataError(f"{folder} has no run in it: a run's folder has {CONFIG_FILE} and {METRICS_FILE} or logs.")
    runs = summaries({str(path.relative_to(folder)): path for path in found})
    return sorted(runs, key=lambda run: (SORTS[sort](run), run.run))


def summaries(folders: Mapping[str, Path], read: Callable[[Path], Logged] | None = None) -> list[RunSummary]:
    """Of each of these runs, by the names that they are shown under. ``read``: of metrics known already."""
    found = list(folders.values())
    with ThreadPoolExecutor(_MAX_THREADS) as pool:
        alive = list(pool.map(is_alive, found))
    configs = [_config(path) for path in found]
    values = [dict(flat(config.model_dump(mode="json"))) if config else {} for config in configs]
    differing = _differing([each for each in values if each])
    runs = []
    for (name, path), is_running, config, own in zip(folders.items(), alive, configs, values, strict=True):
        logged = (read or _read)(path)
        runs.append(
            RunSummary(
                run=name,
                state="running" if is_running else _ENDS.get(logged.last_event or "", "ended"),
                step=logged.step,
                num_steps=config.train.steps or last_num_steps(path) if config else None,
                loss=logged.loss,
                validation_loss=logged.best[0] if logged.best else None,
                best_step=logged.best[1] if logged.best else None,
                lr=config.optimizer.lr if config else None,
                differs={key: own[key] for key in differing if key in own},
            )
        )
    return runs


def differing_keys(runs: Sequence[RunSummary]) -> list[str]:
    """The keys of the config that are not the same in all of these runs."""
    return list(dict.fromkeys(key for run in runs for key in run.differs))


def show(runs: Sequence[RunSummary], console: Console | None = None) -> None:
    """Print them for a person: a row a run, a column a key that differs, or a table of its own for these where the
    terminal is too narrow. What is no terminal gets whole lines."""
    console = console or Console(width=None if sys.stdout.isatty() else _WIDEST)
    keys = [key for key in differing_keys(runs) if key != "optimizer.lr"]  # which has a column anyway
    table = _table(runs, keys)
    if console.measure(table, options=console.options.update(width=_WIDEST)).maximum <= console.width:
        console.print(table)
    else:
        console.print(_table(runs, []), "", _table_of_differences(runs, keys), sep="\n")


def _table(runs: Sequence[RunSummary], keys: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    counts = dict.fromkeys(("step", "loss", "best validation", "at step", "lr"))
    for name in ("run", "state", *counts, *keys):
        table.add_column(name, justify="right" if name in counts else "left", overflow="fold")
    for run in runs:
        of = f"{run.step:,}" if run.num_steps is None else f"{run.step:,}/{run.num_steps:,}"
        figures = (_figure(run.loss), _figure(run.validation_loss), _figure(run.best_step), _figure(run.lr, "g"))
        others = (_shown(run.differs.get(key)) for key in keys)
        table.add_row(*map(escape, (run.run, run.state, of, *figures, *others)))
    return table


def _table_of_differences(runs: Sequence[RunSummary], keys: Sequence[str]) -> Table:
    table = Table("run", "what differs", box=None, pad_edge=False)
    for run in runs:
        pairs = (f"{key}={_shown(run.differs[key])}" for key in keys if key in run.differs)
        table.add_row(escape(run.run), escape(" ".join(pairs)))
    return table


def _find(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if CONFIG_FILE in files and (METRICS_FILE in files or "logs" in folders):
            yield Path(place)
            folders[:] = [name for name in folders if name not in _IN_A_RUN]
        folders.sort()


def _config(run_dir: Path) -> RunConfig | None:
    """What a run trained with last; None where this version cannot read it."""
    try:
        return load(run_dir / CONFIG_FILE)
    except ConfigError:
        return None


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OF_EACH_RUN)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def _read(run_dir: Path) -> Logged:
    step, loss, event = 0, None, None
    validations: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for line in read_lines(run_dir):
            if "event" in line:
                event = line["event"]
            elif "validation_loss" in line:
                validations[line["step"]] = line["validation_loss"]
            elif "loss" in line:
                step, loss, event = line["step"], line["loss"], None
    finite = [(value, at) for at, value in validations.items() if value is not None]
    return Logged(step, loss, min(finite, default=None), event)


def _figure(value: float | None, style: str = ",.4f") -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:{style}}"


def _shown(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""A run for each combination of values: `megatrain sweep CONFIG optimizer.lr=1e-3,3e-3 model.hidden_size=128,256`."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from megatrain.checkpoint.origin import load
from megatrain.config import RunConfig
from megatrain.distributed.signals import SAVE_SIGNAL, STOP_SIGNALS, handlers_restored
from megatrain.errors import EXIT_PREEMPTED, EXIT_USAGE, ConfigError
from megatrain.experiments.runs import show, summarize
from megatrain.observe.metrics import tail
from megatrain.observe.record import CONFIG_FILE

_NOT_IN_NAMES = re.compile(r"[^\w.=+-]+")  # nor commas: they stand between keys


class Point(NamedTuple):
    """One run of a sweep. ``name``: its folder's; ``overrides``: of its config, run.dir included."""

    name: str
    run_dir: Path
    config: RunConfig
    overrides: tuple[str, ...]


def points(config: str, overrides: Sequence[str]) -> list[Point]:
    """Every combination of the values that ``overrides`` give, checked: the last key's values vary fastest.

    Raises ConfigError where no key has several values, or a combination is no legal config.
    """
    axes = [[f"{key}={value}" for value in _values(text)] for key, _, text in (o.partition("=") for o in overrides)]
    varied = [number for number, axis in enumerate(axes) if len(axis) > 1]
    if not varied:
        raise ConfigError("A sweep needs a key with several values, such as optimizer.lr=1e-3,3e-3.")
    if any(override.startswith("run.dir=") and "," in override for override in overrides):
        raise ConfigError("run.dir is the folder of all runs of a sweep: give it one value.")
    found = []
    for chosen in itertools.product(*axes):
        name = ",".join(_short(chosen[number]) for number in varied)
        try:
            loaded = load(config, chosen)
        except ConfigError as error:
            raise ConfigError(f"{' '.join(chosen[number] for number in varied)}: {error}") from None
        run_dir = Path(loaded.run.dir) / name
        found.append(Point(name, run_dir, loaded, (*chosen, f"run.dir={run_dir}")))
    for one, other in itertools.combinations(found, 2):
        if one.config == other.config or one.name == other.name:
            raise ConfigError(f"Two runs of the sweep are the same, {one.name} and {other.name}: give each value once.")
    return found


def _values(text: str) -> list[str]:
    """What stands between the commas of a value that are outside of its brackets."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def run(config: str, sweep: Sequence[Point], num_ranks: int | None, tell: Callable[[str], None]) -> int:
    """Train all points, one after the other, and show how they compare; the exit code of the first that failed.

    One that fails does not keep the others from being trained, unless its config or data is wrong, as that of all.
    A request to stop reaches the run that is training, and ends the sweep when its state is saved.
    """
    first_failure = 0
    for number, point in enumerate(sweep):
        tell(f"[{number + 1}/{len(sweep)}] {point.run_dir}")
        if has_ended(point):
            tell("has ended before")
            continue
        code = _train(config, point, num_ranks)
        first_failure = first_failure or code
        if code in (EXIT_USAGE, EXIT_PREEMPTED):
            return code
    if len(sweep) > 1:
        show(summarize(sweep[0].run_dir.parent))
    return first_failure


def array(
    config: str,
    overrides: Sequence[str],
    num_points: int,
    num_ranks: int | None,
    options: Sequence[str],
    *,
    submit: bool,
) -> int:
    """Print, or submit, the batch script of a SLURM array with a task for each run; the exit code."""
    words = ["sweep", config, *overrides, *([] if num_ranks is None else ["--procs", str(num_ranks)])]
    # Cores are the launcher's own option: its script depends on them.
    passed = [option if option.startswith("--cpus-per-task=") else f"--sbatch={option}" for option in options]
    passed += ["--submit"] * submit
    command = [sys.executable, "-m", "launcher", "array", "--tasks", str(num_points), *passed, "--", *words]
    return subprocess.run(command, check=False).returncode


def _short(override: str) -> str:
    """A key's last part with its value: a folder's name."""
    key, _, value = override.partition("=")
    return _NOT_IN_NAMES.sub("_", f"{key.rpartition('.')[2]}={value}")


def has_ended(point: Point) -> bool:
    """After its last step, or early under the rule that it has now."""
    lines, train = tail(point.run_dir), point.config.train
    if not lines or lines[-1].get("event") != "finish":
        return False
    if train.steps is not None and lines[-1]["step"] >= train.steps:
        return True
    with contextlib.suppress(ConfigError):
        former = load(point.run_dir / CONFIG_FILE).train
        lengths = ((each.steps, each.epochs, each.early_stopping) for each in (former, train))
        return next(lengths) == next(lengths)
    return False


def _train(config: str, point: Point, num_ranks: int | None) -> int:
    procs = [] if num_ranks is None else ["--procs", str(num_ranks)]
    command = [sys.executable, "-m", "megatrain", "train", config, *point.overrides, *procs]
    # A session of its own: a request reaches it through us alone, once.
    training = subprocess.Popen(command, start_new_session=True)

    def pass_on(number: int, _: FrameType | None) -> None:
        training.send_signal(number)

    with handlers_restored():
        for number in (*STOP_SIGNALS, SAVE_SIGNAL):
            signal.signal(number, pass_on)
        return training.wait()

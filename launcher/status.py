"""How a run is doing, by what it leaves in its folder and what SLURM says of its job. Reads alone, changes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from launcher.job import Restarts, newest_step
from launcher.submit import job_state
from megatrain.checkpoint.lock import holder_of, is_alive
from megatrain.config import RunConfig, load
from megatrain.distributed import failures
from megatrain.errors import EXIT_PREEMPTED, EXIT_RANK, ConfigError
from megatrain.observe.goodput import goodput_of
from megatrain.observe.metrics import last_num_steps, tail
from megatrain.units import format_count, format_duration

_NUM_STEPS = 20
"""Of which the median tells the rate."""
_QUIET_SECONDS, _QUIET_STEPS = 60.0, 20.0
_BEGINS = ("start", "resume")
_USUAL = (*_BEGINS, "save", "stop", "finish", "data order")


class Status(NamedTuple):
    """``state``: running, starting, queued, finished or stopped; ``job``: who has the run, in words; ``step_seconds``:
    the median of the last steps; ``saved_step``: of the newest checkpoint, by its name. What is not known is None.
    """

    run: str
    state: str
    job: str
    step: int
    num_steps: int | None
    logged_seconds_ago: float | None
    loss: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    seconds_left: float | None
    saved_step: int | None
    saved_seconds_ago: float | None
    goodput: float | None
    problems: list[str]

    def lines(self) -> Iterator[str]:
        yield f"run        {self.run}"
        yield f"job        {self.state}: {self.job}"
        of = f" of {self.num_steps:,} ({self.step / self.num_steps:.0%})" if self.num_steps else ""
        loss = f", loss {self.loss:.4f}" if self.loss is not None else ""
        ago = f", logged {_ago(self.logged_seconds_ago)}" if self.logged_seconds_ago is not None else ""
        yield f"step       {self.step:,}{of}{loss}{ago}"
        if self.step_seconds is not None:
            mfu = f", MFU {self.mfu:.1%}" if self.mfu is not None else ""
            left = f"; {format_duration(self.seconds_left)} of training left" if self.seconds_left else ""
            speed = f", {format_count(self.tokens_per_second)} tokens/s" if self.tokens_per_second else ""
            yield f"rate       {self.step_seconds:.3g} s a step{speed}{mfu}{left}"
        saved = "none" if self.saved_step is None else f"step {self.saved_step:,}"
        ago = f", {_ago(self.saved_seconds_ago)}" if self.saved_seconds_ago is not None else ""
        yield f"last save  {saved}{ago}"
        if self.goodput is not None:
            yield f"goodput    {self.goodput:.1%}"
        for number, problem in enumerate(self.problems or ["nothing"]):
            yield f"{'wrong' if number == 0 else '':<11}{problem}"


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """The status of a run at a moment, in seconds since 1970. Raises ConfigError for a folder that is no run's."""
    now = time.time() if now is None else now
    lines = tail(run_dir)
    if not lines and not (run_dir / "config.yaml").is_file() and not (run_dir / "logs").is_dir():
        raise ConfigError(f"{run_dir} is no run folder: it has neither config.yaml nor metrics.jsonl nor logs.")
    config = _config(run_dir)
    steps = [line for line in lines if "loss" in line]
    events = [line for line in lines if "event" in line]
    last: Mapping[str, Any] = steps[-1] if steps else {}
    saves = [line for line in events if line["event"] == "save"]
    step = max((line["step"] for line in (*events[-1:], *steps[-1:])), default=0)
    num_steps = config.train.steps or last_num_steps(run_dir) if config else None
    recent = [line["step_seconds"] for line in steps[-_NUM_STEPS:]]
    step_seconds = statistics.median(recent) if recent else None
    state, job = _job(run_dir, lines)
    status = Status(
        run=str(run_dir),
        state=state,
        job=job,
        step=step,
        num_steps=num_steps,
        logged_seconds_ago=now - lines[-1]["time"] if lines else None,
        loss=last.get("loss"),
        step_seconds=step_seconds,
        tokens_per_second=last.get("tokens_per_second"),
        mfu=last.get("mfu"),
        seconds_left=(num_steps - step) * step_seconds if num_steps and step_seconds else None,
        saved_step=_saved_step(run_dir, config, saves),
        saved_seconds_ago=now - saves[-1]["time"] if saves else None,
        goodput=next((found.shares["training"] for line in reversed(lines) if (found := goodput_of(line))), None),
        problems=[],
    )
    return status._replace(problems=list(_problems(status, run_dir, config, steps, events)))


def _saved_step(run_dir: Path, config: RunConfig | None, saves: Sequence[Mapping[str, Any]]) -> int | None:
    """Of the newest checkpoint; of one in an object store, which may not be at hand here, as it was logged."""
    folder = config.checkpoint.dir if config else None
    if folder and "://" in folder:
        return saves[-1]["step"] if saves else None
    return newest_step(run_dir, folder)


def _config(run_dir: Path) -> RunConfig | None:
    """The run's config; None where there is none that this version reads."""
    try:
        return load(run_dir / "config.yaml")
    except ConfigError:
        return None


def _job(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Whether the run is under way, and by whom: the holder of its folder, if that shows signs of life; else a job."""
    holder = holder_of(run_dir)
    names = {name.replace("_", " "): value for name, value in (holder or {}).items()}
    number = (holder or {}).get("slurm_job") or _newest_job(run_dir)
    slurm = job_state(number) if number else None
    words = ", ".join(f"{name} {value}" for name, value in names.items()) or (f"slurm job {number}" if number else "")
    words += f" ({slurm})" if slurm else ""
    if holder is not None and is_alive(run_dir):
        return "running", words
    if slurm is not None:
        return ("queued" if slurm.startswith("PENDING") else "starting"), words
    ended = [line for line in lines if "event" not in line or line["event"] in (*_BEGINS, "stop", "finish")]
    if ended and ended[-1].get("event") == "finish":
        return "finished", words or "no job holds it"
    return "stopped", f"no job holds it{f', the last one was {words}' if words else ''}"


def _newest_job(run_dir: Path) -> str | None:
    numbers = [path.stem.removeprefix("slurm-") for path in (run_dir / "logs").glob("slurm-*.out")]
    return max((number for number in numbers if number.isdigit()), key=int, default=None)


def _problems(
    status: Status,
    run_dir: Path,
    config: RunConfig | None,
    steps: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    failure = failures.last(run_dir) if status.state in ("stopped", "queued") else None
    if status.state == "stopped":
        goes_on = failure is None or failure.exit_code in (EXIT_RANK, EXIT_PREEMPTED)
        advice = "start it again, and it goes on" if goes_on else "mend this, then start it again"
        yield f"no job trains it, it stands at step {status.step:,}: {advice}"
    if failure is not None and failure.exit_code != EXIT_PREEMPTED:
        first = "" if failure.rank is None else f", rank {failure.rank} first"
        yield f"the last start ended with code {failure.exit_code}{first}: {failure.message}"
    if status.state == "running" and status.logged_seconds_ago is not None:
        usual = max(_QUIET_SECONDS, _QUIET_STEPS * _logged_every(steps))
        if status.logged_seconds_ago > usual:
            limit = f" ({config.train.hang_timeout_seconds:.0f} s)" if config else ""
            yield (
                f"nothing was logged for {format_duration(status.logged_seconds_ago)}: it starts, evaluates or saves "
                f"for long, or hangs, which ends after train.hang_timeout_seconds{limit}; the ranks' logs tell"
            )
    if steps and steps[-1]["loss"] is None:
        yield "the loss is not finite"
    every = config.checkpoint.every_steps if config else None
    if every and status.state != "finished" and status.step - (status.saved_step or 0) > 2 * every:
        since = "no checkpoint yet" if status.saved_step is None else f"no checkpoint since step {status.saved_step:,}"
        yield f"{since}, though one is due every {every:,} steps"
    restarts = Restarts.read(run_dir)
    if restarts is not None and restarts.num_fruitless and status.state != "finished":
        yield f"{restarts.num_fruitless} start(s) in a row left no new checkpoint"
    yield from _events(events)


def _logged_every(steps: Sequence[Mapping[str, Any]]) -> float:
    times = [line["time"] for line in steps[-_NUM_STEPS:]]
    return statistics.median(after - before for before, after in pairwise(times)) if times[1:] else 0


def _events(events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was unusual since the run was last started: of each kind how often, and the last one."""
    begun = max((index for index, line in enumerate(events) if line["event"] in _BEGINS), default=0)
    last = {line["event"]: line for line in events[begun:] if line["event"] not in _USUAL}
    for name, line in last.items():
        count = sum(other["event"] == name for other in events[begun:])
        times = f", {count} times, the last" if count > 1 else ""
        yield f"{name}{times} at step {line['step']:,}: {line.get('message', orjson.dumps(line).decode())}"


def _ago(seconds: float | None) -> str:
    return f"{format_duration(max(seconds or 0.0, 0.0))} ago"

"""All outputs of a run behind one interface for the trainer; on rank 0 only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from megatrain.observe.callbacks import Callback
from megatrain.observe.console import ProgressConsole
from megatrain.observe.goodput import GoodputLedger
from megatrain.observe.metrics import NUM_STEPS, MetricsWriter, StepMetrics, TaskFigures
from megatrain.observe.trackers import TrackerProcess
from megatrain.units import format_duration

if TYPE_CHECKING:
    from megatrain.observe.tensorboard import TensorBoardWriter

T = TypeVar("T")


class _FilesThread:
    """Does one thing after the other, without the caller's waiting. What one of them raises, a later call raises."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._waiting: deque[Future[Any]] = deque()

    def do(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
        self._waiting.append(future := self._pool.submit(work, *arguments))
        return future

    def flush(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._pool.shutdown()


class Observers:
    """Console, metrics.jsonl, TensorBoard and trackers of one run, begun at ``resume_step`` (0: from the start).

    ``ledger``: counts where the time goes, from before these began; left out, from now on.
    No method raises for a disk that is full or cannot be written: the run goes on, with a warning in the log. Files are
    written by a thread, in the order of the calls: a step never waits for a disk.
    """

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        resume_step: int = 0,
        tensorboard: bool = True,
        ledger: GoodputLedger | None = None,
        callbacks: Sequence[Callback] = (),
        trackers: Sequence[str] = (),
    ) -> None:
        self._run_dir, self._num_steps, self._resume_step = run_dir, num_steps, resume_step
        self._callbacks = callbacks
        self.is_stop_requested = False
        """Whether a callback has asked for an end."""
        self.ledger = ledger or GoodputLedger(run_dir, time.time())  # before lines that count no more are dropped
        self._console = ProgressConsole(num_steps, resume_step)
        self._metrics = MetricsWriter(run_dir, resume_step)
        self._files = _FilesThread()
        self._has_tensorboard = tensorboard
        self._tracker_names, self._trackers = trackers, list[TrackerProcess]()

    def start(
        self,
        facts: Mapping[str, str],
        startup_seconds: Mapping[str, float] | None = None,
        training_seconds: float = 0.0,
        changes: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        """Show what is about to run (model, layout, where to look), and record that it started or resumed.

        ``startup_seconds``: where the time since the command went, by part; nothing where this is no start.
        ``training_seconds``: that the state took from which steps begin now. ``changes``: what is not as it was when
        that was saved, former and present value.
        """
        self.ledger.begin(training_seconds)
        startup = dict(startup_seconds or {})
        shown = {**facts, "start-up": _in_words(startup)} if startup else dict(facts)
        pairs = {name: map(_in_short, values) for name, values in (changes or {}).items()}
        changed = {name: "was {} and is now {}".format(*values) for name, values in pairs.items()}
        self._console.start(shown | changed)
        dropped = {"num_steps_redone": self._metrics.num_dropped_steps} if self._resume_step else {}
        self._files.do(
            self._metrics.event,
            "resume" if self._resume_step else "start",
            self._resume_step,
            {
                NUM_STEPS: self._num_steps,
                **facts,
                **dropped,
                **({"changes": dict(changes)} if changes else {}),
                **({"startup_seconds": startup} if startup else {}),
                "goodput": self._goodput(),
            },
        )
        if self._tracker_names:  # they read metrics.jsonl, in which no line is now of a step that comes again
            self.flush()
        self._trackers = [TrackerProcess(name, self._run_dir, self._resume_step) for name in self._tracker_names]

    def step(self, metrics: StepMetrics) -> None:
        metrics = replace(metrics, goodput=self._goodput())
        self._files.do(self._metrics.step, metrics)
        self._tell_tensorboard(lambda events: events.step(metrics))
        self._console.step(metrics)
        for tracker in self._trackers:
            self._files.do(tracker.report)
        self._notify(callback.on_step(metrics) for callback in self._callbacks)

    def validation(
        self,
        step: int,
        loss: float,
        seconds: float,
        each: Mapping[str, float] | None = None,
        perplexity: float | None = None,
    ) -> None:
        """Record and show the validation loss after ``step`` steps, and the seconds it took.

        ``each``: the loss of each dataset by its name; shown where there are several. ``perplexity``: None: of labels
        there is none.
        """
        self._files.do(self._metrics.validation, step, loss, seconds, each, perplexity)
        several = each if each and len(each) > 1 else {}
        self._tell_tensorboard(lambda events: events.validation(step, loss, several, perplexity))
        text = "".join(f" | {name} {of_set:.4f}" for name, of_set in several.items())
        self._console.line(f"step {step} | validation loss {loss:.4f}{text} ({format_duration(seconds)})")
        self._notify(callback.on_validation(step, loss, each or {}) for callback in self._callbacks)

    def tasks(self, step: int, figures: TaskFigures, seconds: float) -> None:
        """Record and show the figures of train.tasks after ``step`` steps, and the seconds they took."""
        self._files.do(self._metrics.tasks, step, figures, seconds)
        self._tell_tensorboard(lambda events: events.tasks(step, figures))
        for name, of_task in figures.items():
            text = ", ".join(f"{metric} {figure['value']:.4f}" for metric, figure in of_task.items())
            self._console.line(f"step {step} | {name} | {text}")
        self._notify(callback.on_tasks(step, figures) for callback in self._callbacks)

    def saved(self, step: int, path: object, seconds: float) -> None:
        """Record and show a checkpoint that is now safe at ``path``; training stood still for ``seconds``."""
        self._files.do(self._metrics.event, "save", step, {"path": str(path), "seconds": seconds})
        self._console.line(f"step {step} | saved {path} ({format_duration(seconds)})")
        self._notify(callback.on_save(step, str(path)) for callback in self._callbacks)

    def event(self, name: str, step: int, message: str) -> None:
        """Record and show what else happened after ``step`` steps: skipped, straggler, ..."""
        self._files.do(self._metrics.event, name, step, {"message": message})
        self._console.line(f"step {step} | {message}")
        self._notify(callback.on_event(name, step, message) for callback in self._callbacks)

    def end(self, name: str, step: int, message: str) -> None:
        """Record and show that the run stops or finishes after ``step`` steps, and where its time went; of one that
        finishes, that it diverged, if it did."""
        self.flush()
        if name == "finish" and (divergence := self._metrics.trend.divergence()) is not None:
            message = f"{message}, but {divergence}"
        self._files.do(self._metrics.event, name, step, {"message": message, "goodput": self._goodput()})
        self._console.line(f"step {step} | {message}")
        self._console.line(f"step {step} | {self.ledger.figures.text()}")
        for callback in self._callbacks:
            callback.on_end(step, message)

    def _notify(self, answers: Iterable[bool | None]) -> None:
        self.is_stop_requested |= True in list(answers)  # all are called, also after one that asks for the end

    def _goodput(self) -> dict[str, float]:
        return {part: round(seconds, 3) for part, seconds in self.ledger.figures._asdict().items()}

    def _tell_tensorboard(self, what: Callable[[TensorBoardWriter], object]) -> None:
        if self._has_tensorboard:
            self._files.do(lambda: what(self._tensorboard))

    @cached_property
    def _tensorboard(self) -> TensorBoardWriter:
        """Made by the files' thread behind the first step's lines: it takes long to import."""
        from megatrain.observe.tensorboard import TensorBoardWriter

        return TensorBoardWriter(self._run_dir, self._resume_step)

    def flush(self) -> None:
        """Wait until all that was told is written, as far as the disk takes it."""
        self._files.flush()

    def close(self) -> None:
        self._console.close()
        self._files.do(self._metrics.close)
        self._tell_tensorboard(lambda events: events.close())
        self._files.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Observers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_words(startup_seconds: Mapping[str, float]) -> str:
    parts = [f"{part} {seconds:.1f}" for part, seconds in startup_seconds.items() if seconds >= 0.05]
    return f"{sum(startup_seconds.values()):.1f} s{': ' if parts else ''}{', '.join(parts)}"

"""The figures of a run as TensorBoard events, written without torch or TensorFlow."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatrain.observe.append import AppendFile
from megatrain.observe.figures import figures_of
from megatrain.observe.metrics import StepMetrics, TaskFigures


class TensorBoardWriter:
    """Appends to an event file of its own in RUN/tensorboard; never raises for what cannot be written.

    Where a run resumes at ``resume_step``, TensorBoard drops the later steps that an earlier start wrote.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        # TensorBoard reads the files of a folder in the order of their names: by time, to the nanosecond.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}"
        self._file = AppendFile(run_dir / "tensorboard" / name)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def step(self, metrics: StepMetrics) -> None:
        self._scalars(metrics.step, figures_of(metrics.line()))

    def validation(
        self, step: int, loss: float, each: Mapping[str, float] | None = None, perplexity: float | None = None
    ) -> None:
        """Write the validation loss after ``step`` steps, and by its name that of ``each`` dataset."""
        self._scalars(step, figures_of({"validation_loss": loss, "validation_losses": each, "perplexity": perplexity}))

    def tasks(self, step: int, figures: TaskFigures) -> None:
        """Write the figures of train.tasks after ``step`` steps."""
        self._scalars(step, figures_of({"tasks": figures}))

    def close(self) -> None:
        self._file.close()

    def _scalars(self, step: int, figures: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=figure) for tag, figure in figures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())

"""Work that survives: parts committed one by one into a folder, by any number of worker processes.

A part's file name depends on its unit alone (its input files, their versions, the range), never on who made it or when.
So whoever runs the same command again finds what is there, and does the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pyarrow as pa

from data_tools.units import Unit
from megatrain.data.format import commit_bytes, committed
from megatrain.errors import MegatrainError, RankError

Task = TypeVar("Task")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class PartStore:
    """The parts that are done, in one folder."""

    folder: Path

    def part_path(self, unit: Unit, number: int) -> Path:
        """Where part `number` of a unit is, or will be."""
        return self.folder / f"{unit.key}-{number:06d}.arrow"

    def commit_part(self, unit: Unit, number: int, schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> None:
        """Write a part: whole, or not at all."""
        with committed(self.part_path(unit, number)) as path, pa.ipc.new_file(str(path), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def finish_unit(self, unit: Unit, numbers: list[int]) -> None:
        """Record that the unit consists of these parts, all of which are committed."""
        commit_bytes(self._marker(unit), orjson.dumps(numbers))

    def is_finished(self, unit: Unit) -> bool:
        """Whether all parts of the unit are there."""
        return self._marker(unit).exists() and all(path.exists() for path in self.parts(unit))

    def parts(self, unit: Unit) -> list[Path]:
        """The parts of a finished unit, in order."""
        return [self.part_path(unit, number) for number in orjson.loads(self._marker(unit).read_bytes())]

    def _marker(self, unit: Unit) -> Path:
        return self.folder / f"{unit.key}.json"


def run_tasks(
    function: Callable[[Task, Advance], None], tasks: Sequence[Task], num_workers: int, advance: Advance
) -> None:
    """Call `function(task, advance)` for every task, in this process, or in `num_workers` new ones if that is above 1.

    The first error ends all workers and is raised here. A worker that dies raises RankError. Workers end by themselves
    when this process does, however it does.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        for task in tasks:
            function(task, advance)
        return
    waiting = list(reversed(tasks))
    workers = [_Worker.start(function) for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.send(waiting.pop())
        busy = {worker.connection: worker for worker in workers}
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                kind, value = worker.receive()
                if kind == "advance":
                    advance(value)
                elif kind == "error":
                    raise value
                elif waiting:
                    worker.send(waiting.pop())
                else:
                    worker.connection.close()
                    del busy[worker.connection]
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: Connection

    @staticmethod
    def start(function: Callable[[Any, Advance], None]) -> _Worker:
        # Spawned, not forked: the encoders' threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def send(self, task: object) -> None:
        try:
            self.connection.send(task)
        except ConnectionError:
            raise self._death() from None

    def receive(self) -> tuple[str, Any]:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        return kind, value

    def _death(self) -> RankError:
        self.process.join()
        code = self.process.exitcode or 0
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RankError(
            f"A worker process {cause} in the middle of its work (out of memory?). Nothing half written was kept: "
            "run the same command again to go on, with fewer --workers if memory was short."
        )


def _work(function: Callable[[Any, Advance], None], connection: Connection) -> None:
    """What a worker process does: one task after another, until its parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A worker is one busy core: the encoders' own thread pools would oversubscribe it.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            function(task, lambda amount: connection.send(("advance", amount)))
            message: tuple[str, Any] = ("done", None)
        except (MegatrainError, OSError) as error:
            message = ("error", error)
        except Exception:  # noqa: BLE001 (a bug: it crosses the process border as text)
            message = ("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
        connection.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

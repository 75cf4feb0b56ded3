"""Requests by signal: one that asks for an early end, or for a save, sets a flag that the loop looks at."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""TERM last: whoever sees that a rank listens for it knows that it does for all."""
SAVE_SIGNAL = signal.SIGUSR2
_LOOK_SECONDS = 0.5


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """What the process did about these signals before, it does again afterwards."""
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, SAVE_SIGNAL)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Requests:
    """Listens for the signals by which schedulers and people ask a run to end early, or to save and go on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that asked for an end."""
        self.must_end = False
        """Whether TERM or Ctrl-C has come: launchers send TERM to the ranks that are left when one has died."""
        self._saves: queue.SimpleQueue[None] = queue.SimpleQueue()  # of a thread and a signal handler
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.signal(SAVE_SIGNAL, self._note_save)

    def take_save(self) -> bool:
        is_asked = not self._saves.empty()
        while not self._saves.empty():
            self._saves.get()
        return is_asked

    @contextlib.contextmanager
    def saving_by(self, file: Path) -> Iterator[None]:
        """In this context the ``file`` asks for a save too, and is removed. A thread looks for it: disks are slow."""
        ended = threading.Event()
        self._take(file)
        thread = threading.Thread(target=self._watch, args=(file, ended), name="save-now", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, file: Path, ended: threading.Event) -> None:
        while not ended.wait(_LOOK_SECONDS):
            self._take(file)

    def _take(self, file: Path) -> None:
        with contextlib.suppress(OSError):
            if file.exists():
                file.unlink()
                self._saves.put(None)

    def follow(self, supervisor: int) -> None:
        """From here on the death of process ``supervisor`` is a request to stop too: it can pass none on any more."""
        threading.Thread(target=_signal_after, args=(supervisor,), name="supervisor", daemon=True).start()

    def ignore_further(self) -> None:
        """From here on the process ends by itself: the launcher's TERM to ranks not yet done must not hurt."""
        for number in (*STOP_SIGNALS, SAVE_SIGNAL):
            signal.signal(number, signal.SIG_IGN)

    def _note_save(self, _number: int, _: FrameType | None) -> None:
        self._saves.put(None)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        self.must_end = self.must_end or number != signal.SIGUSR1


def _signal_after(pid: int) -> None:
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)

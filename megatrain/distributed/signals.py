"""Requests to stop: a signal that asks for an early end sets a flag, and the loop ends where its state can be saved."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Listens for the signals by which schedulers and people ask a run to end early."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def ignore_further(self) -> None:
        """From here on the process ends by itself: the launcher's TERM to ranks not yet done must not hurt."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)

"""Where the time goes from the command to the first step, by part."""

from __future__ import annotations

import time

from megatrain.distributed.bootstrap import launched_at
from megatrain.distributed.local_ranks import process_began


class StartClock:
    """Counts the seconds of a start, one part after the other: together they are all the time since it began.

    ``parts``: "launch" until this process was there (where the launcher told when it began), "python" until this clock
    was made, then those that ``lap`` has named. ``began``: when the start began, in seconds since 1970; given where
    it is not the process that has begun.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = process_began() if began is None else began
        self.began = min(launched_at() or self._last, self._last) if began is None else began
        self.parts = {"launch": self._last - self.began} if self.began < self._last else {}
        self.lap("python")

    def lap(self, part: str) -> None:
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + max(now - self._last, 0.0)
        self._last = now

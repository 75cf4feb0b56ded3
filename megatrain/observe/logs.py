"""Log files: one a rank in RUN/logs, and rank 0 also on standard error."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from megatrain.observe.append import AppendFile


class RankLogHandler(logging.Handler):
    """Appends each record to ``path``; a file that cannot be written never stops or disturbs the run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._file = AppendFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.append(self.format(record).encode(errors="backslashreplace") + b"\n")

    def close(self) -> None:
        self._file.close()
        super().close()


class StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: a live progress line replaces it and stays below."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)  # what goes well is for the log file and the progress line
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; where standard error is closed, the log file still has it."""
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


def setup_logging(run_dir: Path, rank: int, console: bool) -> None:
    """Send this process's log to RUN/logs/rank-00000.log and, if ``console`` (rank 0), to standard error.

    Replaces the handlers that an earlier call has set; safe to call again.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, RankLogHandler | StderrHandler | logging.NullHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    # First, so that it can warn of a log file that cannot be written. Without any handler Python itself would print.
    root.addHandler(StderrHandler() if console else logging.NullHandler())
    root.addHandler(RankLogHandler(log_path(run_dir, rank)))


def log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def adopt_logger(name: str) -> None:
    """Take a library's own handlers away, so that its records go where all others do and only rank 0 shows them."""
    adopted = logging.getLogger(name)
    for handler in list(adopted.handlers):
        adopted.removeHandler(handler)
    adopted.propagate = True

"""A start that whoever launched it has given up, while ranks still wait for each other: RUN/logs says so, and why."""

from __future__ import annotations

import contextlib
from pathlib import Path

_FILE = "given-up"


def give_up(run_dir: Path, start: str, why: str) -> None:
    """Tell the ranks of a start that those they wait for do not come; nothing to ranks that have met."""
    with contextlib.suppress(OSError):  # a disk that cannot take it: they wait as long as they would anyway
        _path(run_dir, start).write_text(why, encoding="utf-8")


def why_given_up(run_dir: Path, start: str) -> str | None:
    """What was told to the ranks of a start; None where it has not been given up."""
    try:
        return _path(run_dir, start).read_text(encoding="utf-8")
    except OSError:
        return None


def forget(run_dir: Path) -> None:
    """Before a start: what the earlier ones were told no longer counts."""
    for path in (run_dir / "logs").glob(f"{_FILE}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def _path(run_dir: Path, start: str) -> Path:
    return run_dir / "logs" / f"{_FILE}-{start}"

"""Who failed first: of many ranks that fail together, one speaks, and the launcher learns the cause.

A launcher that sees a start fail before all ranks have joined records that itself, and those that wait end.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import orjson

from megatrain.errors import RankError

_FILE = "first-failure"


class LostPeer(RankError):
    """Another rank does not answer any more: it has died, or the link to it has failed."""


class Failure(NamedTuple):
    """What ended a rank (None: what a launcher saw): its exit code, and one paragraph for the user."""

    rank: int | None
    exit_code: int
    message: str


def claim(run_dir: Path, start: str, failure: Failure) -> bool:
    """Record the failure unless another rank was first; whether this rank is the one to speak.

    ``start`` names this start of the run: one that was left behind must not speak for its successor.
    """
    path = _path(run_dir, start)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(orjson.dumps({**failure._asdict(), "time": time.time()}))
        return True
    except FileExistsError:
        return False
    except OSError:  # a folder that cannot be written: rather too many voices than none
        return True


def read(run_dir: Path, start: str) -> Failure | None:
    return _read(_path(run_dir, start))


def last(run_dir: Path) -> Failure | None:
    found = list((run_dir / "logs").glob(f"{_FILE}-*.json"))
    return _read(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def _read(path: Path) -> Failure | None:
    try:
        record = orjson.loads(path.read_bytes())
        return Failure(record["rank"], record["exit_code"], record["message"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Before a start: the failures of the one before no longer count."""
    with contextlib.suppress(OSError):
        for path in (run_dir / "logs").glob(f"{_FILE}-*.json"):
            path.unlink(missing_ok=True)


def _path(run_dir: Path, start: str) -> Path:
    return run_dir / "logs" / f"{_FILE}-{start}.json"

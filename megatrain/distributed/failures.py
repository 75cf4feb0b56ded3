"""Who failed first: of many ranks that fail together, one speaks, and the launcher learns the cause."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

import orjson

_FILE = "first-failure.json"


class Failure(NamedTuple):
    """What ended a rank: its exit code, and one paragraph for the user."""

    rank: int
    exit_code: int
    message: str


def claim(run_dir: Path, failure: Failure) -> bool:
    """Record the failure unless another rank was first; whether this rank is the one to speak."""
    path = run_dir / "logs" / _FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(orjson.dumps({**failure._asdict(), "time": time.time()}))
        return True
    except FileExistsError:
        return False
    except OSError:  # a folder that cannot be written: rather too many voices than none
        return True


def read(run_dir: Path) -> Failure | None:
    """The first failure of the run's last start."""
    try:
        record = orjson.loads((run_dir / "logs" / _FILE).read_bytes())
        return Failure(record["rank"], record["exit_code"], record["message"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Before a start: the failures of the one before no longer count."""
    with contextlib.suppress(OSError):
        (run_dir / "logs" / _FILE).unlink(missing_ok=True)

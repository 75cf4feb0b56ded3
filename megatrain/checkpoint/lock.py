"""One job a run folder: a lock that its holder's death releases, and a note of who holds it. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from megatrain.errors import CheckpointError

_LOCK, _HOLDER = ".lock", ".lock-holder.json"
_PATIENCE_SECONDS = 0.3  # another start may be looking, for a moment, whether the folder is free


@contextlib.contextmanager
def locked(run_dir: Path, job: Mapping[str, str]) -> Iterator[None]:
    """Hold the run folder, made if it is missing. Raises CheckpointError naming the job that holds it, or why it cannot
    be made."""
    lock = FileLock(run_dir / _LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        raise CheckpointError(
            f"{run_dir} is in use by {_holder(run_dir)}: stop that run, or use another run.dir."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"The run folder {run_dir} cannot be made or written to: {error.strerror}. Set run.dir elsewhere."
        ) from None
    with contextlib.suppress(OSError):
        (run_dir / _HOLDER).write_bytes(orjson.dumps(dict(job)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / _HOLDER).unlink()
        lock.release()


def refuse_if_locked(run_dir: Path) -> None:
    """Raise CheckpointError if another job holds the run folder at this moment."""
    with locked(run_dir, {}):
        pass


def _holder(run_dir: Path) -> str:
    try:
        job = orjson.loads((run_dir / _HOLDER).read_bytes())
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in job.items()) or "another job"
    except (OSError, orjson.JSONDecodeError, AttributeError):
        return "another job"

"""One job a run folder. Imports no torch.

On one machine a file lock decides, which its holder's death releases. Across machines such a lock may not reach, or may
outlive its holder; there the lease decides: the holder says who it is, and moves a counter as long as it lives. No
two clocks are compared: whoever wants the folder watches whether the counter moves.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from filelock import BaseFileLock, FileLock, Timeout

from megatrain.errors import CheckpointError, Superseded

LEASE_SECONDS = 15.0  # a holder on another machine that has not moved for so long is dead
_BEAT_SECONDS = 2.0
_LOCK, _LEASE, _BEAT = ".lock", ".lease.json", ".beat-"
_PATIENCE_SECONDS = 0.3  # another start may be looking, for a moment, whether the folder is free


@dataclass(frozen=True)
class _Holder:
    """Who holds the folder. ``machine``: the boot of the kernel it runs on, where Linux tells."""

    job: Mapping[str, str]
    machine: str
    token: str

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.job.items()) or "another job"


class Lease:
    """The run folder is this job's, until another start of the run takes it over."""

    def __init__(self, run_dir: Path, holder: _Holder) -> None:
        self._run_dir, self._holder = run_dir, holder
        self._ended = threading.Event()
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Superseded if another start has taken the run over; looks once a second at most."""
        if time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        now = _read_holder(self._run_dir)
        if now is not None and now.token != self._holder.token:
            raise Superseded(f"This run has been taken over by {now} ({self._run_dir}): this start of it ends.")

    def end(self) -> None:
        """Give the folder back."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            (self._run_dir / f"{_BEAT}{self._holder.token}").unlink(missing_ok=True)
            now = _read_holder(self._run_dir)
            if now is not None and now.token == self._holder.token:
                (self._run_dir / _LEASE).unlink()

    def _beat(self) -> None:
        """Move the counter. A file of its own: a holder that has been superseded must not write over its successor."""
        count = 0
        while True:
            with contextlib.suppress(OSError):  # a full or distant disk must not end the run
                (self._run_dir / f"{_BEAT}{self._holder.token}").write_text(str(count))
            count += 1
            if self._ended.wait(_BEAT_SECONDS):
                return


@contextlib.contextmanager
def locked(run_dir: Path, job: Mapping[str, str]) -> Iterator[Lease]:
    """Hold the run folder, made if it is missing. Raises CheckpointError naming the job that holds it, or why it cannot
    be made.

    Taken over from its holder: at once by a later start of the same SLURM job, and where the holder is dead.
    """
    with _looking(run_dir):
        lock = _acquire(run_dir, job)
        holder = _Holder(job, _machine(), secrets.token_hex(8))
        _write_holder(run_dir, holder)
    lease = Lease(run_dir, holder)
    try:
        yield lease
    finally:
        lease.end()
        lock.release()


def folders_of(run_dir: Path, checkpoint_dir: str | None) -> list[Path]:
    """What only one job may have at a time: the run folder, and checkpoint.dir where that is another folder.

    Of an object store the generations alone keep two runs apart.
    """
    if checkpoint_dir is None or "://" in checkpoint_dir or Path(checkpoint_dir).resolve() == run_dir.resolve():
        return [run_dir]
    return [run_dir, Path(checkpoint_dir)]


def refuse_if_locked(run_dir: Path, job: Mapping[str, str]) -> None:
    """Raise CheckpointError if another job holds the run folder at this moment, and ``job`` may not take it over."""
    with _looking(run_dir):
        _refuse_if_held(run_dir, job)


def holder_of(run_dir: Path) -> Mapping[str, str] | None:
    """The job that holds the run folder, or did when it died; None where none does. Changes nothing."""
    holder = _read_holder(run_dir)
    return holder.job if holder else None


def is_alive(run_dir: Path) -> bool:
    """Whether the holder gives a sign of life; where it gives none, it takes LEASE_SECONDS to know. Changes nothing."""
    holder = _read_holder(run_dir)
    return holder is not None and _is_moving(run_dir, holder)


@contextlib.contextmanager
def _looking(run_dir: Path) -> Iterator[None]:
    """Of those that want the folder, one looks at a time."""
    lock = FileLock(run_dir / f"{_LOCK}-change")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with lock.acquire(timeout=2 * LEASE_SECONDS):
            yield
    except Timeout:
        raise _in_use(run_dir, "another job that is just starting") from None
    except OSError as error:
        raise CheckpointError(
            f"The run folder {run_dir} cannot be made or written to: {error.strerror}. Set it elsewhere."
        ) from None


def _acquire(run_dir: Path, job: Mapping[str, str]) -> BaseFileLock:
    """The file lock, a new one where the holder of the old has been superseded and may still have it."""
    if _refuse_if_held(run_dir, job):
        (run_dir / _LOCK).unlink(missing_ok=True)
    for path in run_dir.glob(f"{_BEAT}*"):
        path.unlink(missing_ok=True)
    lock = FileLock(run_dir / _LOCK)
    lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.05)
    return lock


def _refuse_if_held(run_dir: Path, job: Mapping[str, str]) -> bool:
    """Whether the file lock is still held, by a job that may be taken over. Raises CheckpointError where it may not."""
    holder = _read_holder(run_dir)
    is_locked = _is_locked(run_dir)
    if holder is None:
        if is_locked:
            raise _in_use(run_dir, "another job")
        return False
    if _is_restart(job, holder.job):
        return is_locked
    is_alive = is_locked if holder.machine == _machine() else _is_moving(run_dir, holder)
    if is_alive:
        raise _in_use(run_dir, str(holder))
    return is_locked


def _is_locked(run_dir: Path) -> bool:
    lock = FileLock(run_dir / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        return True
    lock.release()
    return False


def _is_restart(job: Mapping[str, str], holder: Mapping[str, str]) -> bool:
    """Whether ``job`` is the same SLURM job as ``holder``, started again since."""
    if "slurm_job" not in job or job["slurm_job"] != holder.get("slurm_job"):
        return False
    return int(job.get("slurm_restarts", "0")) > int(holder.get("slurm_restarts", "0"))


def _is_moving(run_dir: Path, holder: _Holder) -> bool:
    """Whether the holder's counter moves; known as soon as it does, or after LEASE_SECONDS."""
    path = run_dir / f"{_BEAT}{holder.token}"

    def look() -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None

    first, deadline = look(), time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if look() != first:
            return True
    return False


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _write_holder(run_dir: Path, holder: _Holder) -> None:
    """Say who holds the folder; on a full disk nobody says it, and the file lock alone decides."""
    aside = run_dir / f"{_LEASE}.{holder.token}"
    try:
        aside.write_bytes(orjson.dumps({"job": dict(holder.job), "machine": holder.machine, "token": holder.token}))
        aside.replace(run_dir / _LEASE)
    except OSError:
        aside.unlink(missing_ok=True)
        (run_dir / _LEASE).unlink(missing_ok=True)


def _read_holder(run_dir: Path) -> _Holder | None:
    try:
        record = orjson.loads((run_dir / _LEASE).read_bytes())
        return _Holder(dict(record["job"]), record["machine"], record["token"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _in_use(run_dir: Path, holder: str) -> CheckpointError:
    return CheckpointError(f"{run_dir} is in use by {holder}: stop that run, or use another folder.")

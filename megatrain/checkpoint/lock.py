"""One job a run folder. Imports no torch.

``RUN/.lock`` says who holds the folder. Its holder locks it, which ends with the holder: on one machine that decides.
Across machines such a lock may not reach, or may outlive its holder; there the file's time decides, which the holder
moves as long as it lives. No two clocks are compared: whoever wants the folder watches whether the time moves. Each
holder makes a file of its own and renames it there, so one that was superseded moves the time of a file nobody sees.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from filelock import FileLock, Timeout

from megatrain.distributed.bootstrap import boot_id
from megatrain.errors import CheckpointError, Superseded

LEASE_SECONDS = 15.0  # a holder on another machine that has not moved for so long is dead
_BEAT_SECONDS = 1.0
_DYING_SECONDS = 2.0  # a process that was killed holds its lock until its memory has been given back
_LOCK = ".lock"


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

    def __init__(self, run_dir: Path, job: Mapping[str, str]) -> None:
        self._run_dir, self._token = run_dir, secrets.token_hex(8)
        holder = _Holder(job, boot_id(), self._token)
        unfinished = run_dir / f"{_LOCK}.{self._token}"
        self._file = unfinished.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(OSError):  # on a full disk nobody says who it is, and the lock alone decides
            self._file.write(orjson.dumps(holder))
            os.fsync(self._file.fileno())
        unfinished.replace(run_dir / _LOCK)
        self._ended = threading.Event()
        self._superseded: str | None = None
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Superseded if another start has taken the run over, as a thread has seen, which looks every second."""
        if self._superseded is not None:
            raise Superseded(self._superseded)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        holder = _read_holder(self._run_dir)
        if holder is not None and holder.token == self._token:
            with contextlib.suppress(OSError):
                (self._run_dir / _LOCK).unlink()
        self._file.close()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a distant disk must not end the run
                os.utime(self._file.fileno())
            holder = _read_holder(self._run_dir)
            if holder is not None and holder.token != self._token:
                self._superseded = f"This run has been taken over by {holder} ({self._run_dir}): this start of it ends."


@contextlib.contextmanager
def locked(run_dir: Path, job: Mapping[str, str]) -> Iterator[Lease]:
    """Hold the run folder, made if it is missing. Raises CheckpointError naming the job that holds it, or why it cannot
    be made.

    Taken over from its holder: at once by a later start of the same SLURM job, and where the holder is dead.
    """
    with _exclusively(run_dir):
        _refuse_if_held(run_dir, job)
        lease = Lease(run_dir, job)
    try:
        yield lease
    finally:
        lease.end()


def folders_of(run_dir: Path, checkpoint_dir: str | None) -> list[Path]:
    """What only one job may have at a time: the run folder, and checkpoint.dir where that is another folder.

    Of an object store the generations alone keep two runs apart.
    """
    if checkpoint_dir is None or "://" in checkpoint_dir or Path(checkpoint_dir).resolve() == run_dir.resolve():
        return [run_dir]
    return [run_dir, Path(checkpoint_dir)]


def refuse_if_locked(run_dir: Path, job: Mapping[str, str]) -> None:
    """Raise CheckpointError if another job holds the run folder at this moment, and ``job`` may not take it over."""
    with _exclusively(run_dir):
        _refuse_if_held(run_dir, job)


def holder_of(run_dir: Path) -> Mapping[str, str] | None:
    """The job that holds the run folder, or did when it died; None where none does. Changes nothing."""
    holder = _read_holder(run_dir)
    return holder.job if holder else None


def is_alive(run_dir: Path) -> bool:
    """Whether a holder lives; of one on another machine it takes LEASE_SECONDS to know that not. Changes nothing."""
    with contextlib.suppress(OSError):
        return _lives(run_dir, _read_holder(run_dir))
    return False


@contextlib.contextmanager
def _exclusively(run_dir: Path) -> Iterator[None]:
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


def _refuse_if_held(run_dir: Path, job: Mapping[str, str]) -> None:
    holder = _read_holder(run_dir)
    if holder is not None and _is_restart(job, holder.job):
        return
    deadline = time.monotonic() + _DYING_SECONDS
    while _lives(run_dir, holder):
        if time.monotonic() > deadline:
            raise _in_use(run_dir, str(holder or "another job"))
        time.sleep(0.05)


def _lives(run_dir: Path, holder: _Holder | None) -> bool:
    return _is_locked(run_dir) if holder is None or holder.machine == boot_id() else _is_moving(run_dir)


def _is_locked(run_dir: Path) -> bool:
    try:
        with (run_dir / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _is_restart(job: Mapping[str, str], holder: Mapping[str, str]) -> bool:
    """Whether ``job`` is the same SLURM job as ``holder``, started again since."""
    if "slurm_job" not in job or job["slurm_job"] != holder.get("slurm_job"):
        return False
    return int(job.get("slurm_restarts", "0")) > int(holder.get("slurm_restarts", "0"))


def _is_moving(run_dir: Path) -> bool:
    """Whether the holder moves the file's time; known as soon as it does, or after LEASE_SECONDS."""

    def look() -> int:
        with (run_dir / _LOCK).open("rb") as file:  # on NFS only what is opened is sure to be up to date
            return os.fstat(file.fileno()).st_mtime_ns

    try:
        first, deadline = look(), time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if look() != first:
                return True
    except FileNotFoundError:  # it has been given back
        pass
    return False


def _read_holder(run_dir: Path) -> _Holder | None:
    try:
        record = orjson.loads((run_dir / _LOCK).read_bytes())
        return _Holder(dict(record["job"]), record["machine"], record["token"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _in_use(run_dir: Path, holder: str) -> CheckpointError:
    return CheckpointError(f"{run_dir} is in use by {holder}: stop that run, or use another folder.")

"""The life of the folder that a command writes: begun once, gone on with after a kill, finished once.

What is unfinished lies in `.work` in it: which command it is, who coordinates it, and what is committed so far.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson

from data_tools.job import Effort, Stage, run_stages, when_seen
from data_tools.origin import Origin
from data_tools.outputs import refuse_occupied
from data_tools.ranks import batch_job
from megatrain.atomic import commit_first
from megatrain.data.format import canonical_json
from megatrain.distributed.bootstrap import boot_id
from megatrain.errors import ConfigError

WORK_FOLDER = ".work"
REMOVED = f"{WORK_FOLDER}-removed-"
COMMAND_FILE = "command.json"
COORDINATOR_FILE = "coordinator"
SIGN_SECONDS = 10.0
"""How often a coordinator shows that it is alive."""
SILENT_SECONDS = 60.0
"""After so long without a sign, one on another machine is taken for dead."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class OutputFolder:
    """Where a command writes."""

    out: Path
    finished: Path
    """Committed last: what it says is whole."""
    is_made: Callable[[Path], bool]
    """Whether a file or folder in `out` is of those that the command makes."""

    @property
    def work(self) -> Path:
        return self.out / WORK_FOLDER

    @property
    def is_finished(self) -> bool:
        return self.finished.exists()

    def run(self, origin: Origin, effort: Effort, restart: bool, stages: Callable[[Path], Iterable[Stage]]) -> bool:
        """Run the stages, which commit `finished` last. False where units of other processes are still to be run.

        `stages` is called with the folder, in `.work`, for all that depends on these very inputs; `.work` itself keeps
        what is named after its own origin. The caller has checked what is finished already. Raises ConfigError where
        another command has begun the folder, or another process coordinates this one.
        """
        is_shared = effort.place is not None and effort.place.share is not None
        if restart and is_shared:
            raise ConfigError(
                "--restart by one of several tasks would remove what the others do. Delete the folder before they "
                "start, or let one process do it alone."
            )
        if not (restart and self.is_finished):
            refuse_occupied(self.out, self.work)
        self._sweep()
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with nullcontext() if is_shared else coordinating(self.out, self.work):
                if restart:
                    self._clear()
                if not self.is_finished:
                    when_seen(self.work, partial(self._join, origin.command))
                    folder = self.work / f"of-{origin.versions}"
                    folder.mkdir(exist_ok=True)
                    if not is_shared:
                        self._remove_stale(folder)
                    if not when_seen(folder, lambda: run_stages(stages(folder), folder, effort)):
                        return False
                self._remove(self.work)
        except FileNotFoundError:
            if self.work.exists() or not self.is_finished:
                raise
            # Another process, which ran the same units, has finished meanwhile.
        return True

    def close(self) -> None:
        """Remove what a kill has left of the work on what is finished."""
        self._sweep()
        with suppress(FileNotFoundError):  # another process, which has just finished, removes it itself
            if self.work.exists():
                with coordinating(self.out, self.work):
                    self._remove(self.work)

    def _sweep(self) -> None:
        for path in self.out.glob(f"{REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _join(self, command: Mapping[str, object]) -> None:
        """Record which command the folder belongs to, or check that it is this one."""
        path = self.work / COMMAND_FILE
        given = canonical_json(command)
        commit_first(path, given)
        begun = dict(_leaves(orjson.loads(path.read_bytes())))
        differing = [key for key, value in _leaves(orjson.loads(given)) if begun.get(key) != value]
        if differing:
            raise ConfigError(
                f"{self.out} is unfinished, and was begun by a command with other {', '.join(differing)}. "
                "Run that command again to finish it, give another --out, or delete the folder to start over."
            )

    def _clear(self) -> None:
        """Remove what this command has made, by the names that it gives, and nothing else."""
        self.finished.unlink(missing_ok=True)  # first: what is left without it is unfinished
        for path in self.out.iterdir():
            if self.is_made(path.relative_to(self.out)):
                self._remove(path)
        for path in self.work.iterdir():
            if path.name not in (COMMAND_FILE, COORDINATOR_FILE):
                self._remove(path)

    def _remove_stale(self, folder: Path) -> None:
        """Remove what depends on other inputs, or on versions of them that are gone."""
        for path in self.work.glob("of-*"):
            if path != folder:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a file or a folder: renamed aside first, so that no process adds to what is being removed."""
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        aside = self.out / f"{REMOVED}{secrets.token_hex(4)}"
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def coordinating(out: Path, work: Path) -> Iterator[None]:
    """Be the one process that coordinates the work. Raises ConfigError where another does.

    This saves work; it is not what makes the result right. Two that do it all the same commit the same bytes.
    """
    path, nonce = work / COORDINATOR_FILE, secrets.token_hex(8)
    private = work / f".{COORDINATOR_FILE}-{nonce}"
    private.write_bytes(json.dumps({**_this_process(), "nonce": nonce}).encode())
    try:
        if not _link(private, path):
            if (why := _why_alive(path, private.stat().st_mtime)) is not None:
                raise ConfigError(f"Another process is at work on {out} just now: {why}")
            private.rename(path)
    finally:
        private.unlink(missing_ok=True)
    ended = threading.Event()
    signs = threading.Thread(target=_show_signs, args=(path, nonce, ended), daemon=True)
    signs.start()
    try:
        yield
    finally:
        ended.set()
        signs.join()
        if _read(path).get("nonce") == nonce:
            path.unlink(missing_ok=True)


def _link(private: Path, path: Path) -> bool:
    """Whether `path` is now this file. Its number of links tells: NFS may lose an answer, and repeat the call."""
    try:
        path.hardlink_to(private)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno in NO_LINKS:
            return not path.exists() and bool(private.replace(path))
        raise
    return private.stat().st_nlink == 2


def _why_alive(path: Path, now: float) -> str | None:
    """Who coordinates, and what to do about it; None where that process is gone. `now`: by the file system's clock."""
    other, this = _read(path), _this_process()
    if not other or (this["job"] and this["job"] == other["job"] and this["host"] != other["host"]):
        return None  # SLURM has started the job of the other again, as this one
    who = f"process {other['pid']} on {other['host']}" + (f" (job {other['job']})" if other["job"] else "")
    if (other["host"], other["boot"]) == (this["host"], this["boot"]):
        is_alive = other["started"] == _start_time(other["pid"])
        return f"{who}. Wait for it, or stop it." if is_alive else None
    with suppress(FileNotFoundError):
        silent_seconds = now - path.stat().st_mtime
        if silent_seconds < SILENT_SECONDS:
            return (
                f"{who}, last seen {max(silent_seconds, 0):.0f} seconds ago. Wait for it, or stop it; "
                f"{SILENT_SECONDS:.0f} seconds after its end this command takes over."
            )
    return None


def _show_signs(path: Path, nonce: str, ended: threading.Event) -> None:
    while not ended.wait(SIGN_SECONDS):
        with suppress(OSError):
            if _read(path).get("nonce") == nonce:
                os.utime(path)


def _read(path: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = orjson.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def _this_process() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "boot": boot_id(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": batch_job(),
    }


def _start_time(pid: object) -> str | None:
    """When a process of this machine began, in ticks since the boot; None where there is none, or only its remains."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _leaves(command: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in command.items():
        yield from _leaves(value) if isinstance(value, dict) else [(key, value)]

"""The ranks on this machine, as processes: found, sent a signal, ended. Whoever starts ranks uses this."""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

TRAINER = "megatrain.train"
_GRACE_SECONDS = 60.0


def find_ranks(is_ours: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The processes that are `python -m megatrain.train` themselves (not a launcher of it) and belong to the run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if _is_trainer(process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error, OSError):
                if is_ours(process):
                    found.append(process)
    return found


def signal_one(ranks: Sequence[psutil.Process], number: int) -> bool:
    """Send a signal to the first rank that listens for it, which tells the others; whether there is one yet.

    One that does not listen would die of it. Python itself catches SIGINT from the start, and would end with a
    traceback: who listens for TERM listens for all.
    """
    for process in ranks:
        if _listens(process.pid, signal.SIGTERM if number == signal.SIGINT else number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                return True
    return False


def kill_stopped(ranks: Sequence[psutil.Process]) -> None:
    """KILL those stopped by SIGSTOP, of a run that has failed: they answer nobody, and all would wait."""
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                process.kill()


def kill(ranks: Sequence[psutil.Process]) -> None:
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def terminate(ranks: Sequence[psutil.Process]) -> None:
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()


def end(ranks: Sequence[psutil.Process]) -> None:
    """Ask ranks to save and stop; KILL those that do not in a minute."""
    kill_stopped(ranks)
    terminate(ranks)
    _, alive = psutil.wait_procs(ranks, timeout=_GRACE_SECONDS)
    kill(alive)


def process_began() -> float:
    began: float = psutil.Process().create_time()
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return began
    # psutil adds the time since the boot to that of the boot, which Linux gives in whole seconds.
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - (began - psutil.boot_time()))


def _is_trainer(line: list[str]) -> bool:
    options = list(itertools.takewhile(lambda word: word.startswith("-") and word != "-m", line[1:]))
    return line[1 + len(options) :][:2] == ["-m", TRAINER]


def _listens(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as Linux tells; elsewhere it is taken to have one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)

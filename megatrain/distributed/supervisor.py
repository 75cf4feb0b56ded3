"""Starts the local `deepspeed` launcher for `megatrain train`, passes signals on to the ranks, keeps the first cause.

The launcher alone would leave orphans when it is told to stop, and answer with whichever code it saw first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatrain.distributed import failures
from megatrain.distributed.bootstrap import child_environment
from megatrain.distributed.signals import STOP_SIGNALS
from megatrain.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RANK

_GRACE_SECONDS = 20.0
_TRAINER = "megatrain.train"


def launch(config: str, overrides: Sequence[str], num_ranks: int, run_dir: Path, *, has_gpu: bool) -> int:
    """Run the trainer on ``num_ranks`` local ranks until it ends; the exit code of the first cause."""
    failures.forget(run_dir)
    env = child_environment(num_ranks, has_gpu=has_gpu)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null/none"]
    command += [
        "--num_accelerators",
        str(num_ranks),
        "--master_port",
        env["MASTER_PORT"],
        "--no_local_rank",
        "--log_level",
        "critical",
    ]
    command += ["--module", _TRAINER, config, *overrides]
    # A session of its own: Ctrl-C reaches the ranks through us alone, once.
    launcher = subprocess.Popen(command, env=env, start_new_session=True)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda got, _frame: _pass_on(launcher.pid, got))
    try:
        status = launcher.wait()
    finally:
        _end_orphans(launcher.pid)
    return _verdict(status, run_dir)


def _pass_on(launcher: int, number: int) -> None:
    """A signal to the ranks alone: the launcher would answer by killing them in the middle of their save."""
    for process in _ranks(launcher):
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _ranks(launcher: int) -> list[psutil.Process]:
    """The launcher's session's processes that are trainers (it may have ended before them)."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        is_trainer = _TRAINER in line and "-m" in line and "deepspeed.launcher" not in " ".join(line)
        if is_trainer and _session(process) == launcher:
            found.append(process)
    return found


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _end_orphans(launcher: int) -> None:
    """End the ranks that outlived their launcher: TERM, and KILL for those that do not listen."""
    ranks = _ranks(launcher)
    for process in ranks:
        process.terminate()
    _, alive = psutil.wait_procs(ranks, timeout=_GRACE_SECONDS)
    for process in alive:
        process.kill()


def _verdict(status: int, run_dir: Path) -> int:
    """The launcher's status, in our codes."""
    if status == 0:
        return 0
    first = failures.read(run_dir)
    if first is not None:
        if first.exit_code != EXIT_PREEMPTED or status == EXIT_PREEMPTED:
            return first.exit_code
        sys.stderr.write("A rank failed after the state was saved; the logs of the ranks say why.\n")
        return EXIT_RANK
    signal_number = (
        -status if status < 0 else status - 128 if 128 < status < 192 else 256 - status if status > 192 else 0
    )
    if signal_number:
        name = signal.Signals(signal_number).name if signal_number in set(signal.Signals) else str(signal_number)
        sys.stderr.write(f"A rank was killed ({name}). Start the run again: it goes on from the newest checkpoint.\n")
        return EXIT_RANK
    return status if status in (2, 3, 4, 5) else EXIT_BUG

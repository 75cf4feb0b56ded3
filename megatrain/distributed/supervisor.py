"""Starts the ranks of `megatrain train` on this machine, passes signals on to them, keeps the first cause.

The ranks are told what the `deepspeed` launcher would tell them. That launcher loads torch and DeepSpeed before it
starts the first rank, which takes as long as the ranks' own imports, and it ends ranks in the middle of their save.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from megatrain.distributed import failures, local_ranks
from megatrain.distributed.bootstrap import child_environment, local_rank_variables, start_name
from megatrain.distributed.signals import SAVE_SIGNAL, STOP_SIGNALS
from megatrain.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RANK

_POLL_SECONDS = 0.05
_NOTICE_SECONDS = 1.0
"""For the others to notice by themselves that a rank has ended, and to end in good order, before they get TERM."""
_END_SECONDS = 12.0
"""For them to end after a cause has been recorded."""
_LONGEST_END_SECONDS = 31.0
"""The same where none has been, or where all are ending because they were asked to."""


def launch(config: str, overrides: Sequence[str], num_ranks: int, run_dir: Path, *, has_gpu: bool) -> int:
    """Train on so many ranks of this machine; the exit code of the first cause."""
    failures.forget(run_dir)
    requested: list[int] = []
    for number in (*STOP_SIGNALS, SAVE_SIGNAL):
        signal.signal(number, lambda got, _frame: requested.append(got))
    env = child_environment(num_ranks, has_gpu=has_gpu, launched_at=local_ranks.process_began())
    command = [sys.executable, "-u", "-m", local_ranks.TRAINER, config, *overrides]
    ranks: list[psutil.Popen] = []
    try:
        for rank in range(num_ranks):
            here = {**env, **local_rank_variables(rank, num_ranks)}
            # A session of its own: Ctrl-C reaches the ranks through us alone, once.
            ranks.append(psutil.Popen(command, env=here, start_new_session=True))
        status = _watch(ranks, requested, lambda: failures.read(run_dir, start_name(env)))
    finally:
        local_ranks.end([process for process in ranks if process.poll() is None])
    return resolve_exit_code(status, failures.read(run_dir, start_name(env)))


def _watch(
    ranks: Sequence[psutil.Popen], requested: list[int], first_failure: Callable[[], failures.Failure | None]
) -> int:
    """Wait until all ranks have ended; the exit code of the first that ended with another than 0.

    ``requested``: signals to pass on, which come in meanwhile.
    """
    status, failed_at, is_told = 0, None, False
    while alive := [rank for rank in ranks if rank.poll() is None]:
        # To one of them, which tells the others.
        if requested and local_ranks.signal_one(alive, requested[0]):
            requested.pop(0)
        status = status or _first_code(ranks)
        first = first_failure()
        if status or first is not None:
            failed_at = failed_at or time.monotonic()
            seconds = time.monotonic() - failed_at
            if first is not None:
                local_ranks.kill_stopped(alive)
            if status and not is_told and seconds > _NOTICE_SECONDS:
                local_ranks.terminate(alive)
                is_told = True
            is_recorded = first is not None and first.exit_code != EXIT_PREEMPTED
            if seconds > (_END_SECONDS if is_recorded else _LONGEST_END_SECONDS):
                local_ranks.kill(alive)
        time.sleep(_POLL_SECONDS)
    return status or _first_code(ranks)


def _first_code(ranks: Sequence[psutil.Popen]) -> int:
    return next((rank.returncode for rank in ranks if rank.returncode), 0)


def resolve_exit_code(status: int, first: failures.Failure | None) -> int:
    """A rank's or a launcher's status in our codes: the first cause counts, not what followed it. Standard error tells
    why."""
    if status == 0 and first is None:
        return 0
    if first is not None and first.exit_code != EXIT_PREEMPTED:
        return first.exit_code
    if first is not None:
        if status == EXIT_PREEMPTED:
            return EXIT_PREEMPTED
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

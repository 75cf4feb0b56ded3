"""Starts the local `deepspeed` launcher for `megatrain train`, passes signals on to the ranks, keeps the first cause.

The launcher alone would leave orphans when it is sent a signal, and answer with whichever code it saw first.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import orjson
import psutil

from megatrain.distributed import failures, local_ranks
from megatrain.distributed.bootstrap import child_environment, start_name, visible_gpus
from megatrain.distributed.signals import SAVE_SIGNAL, STOP_SIGNALS
from megatrain.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RANK

_POLL_SECONDS = 0.1
_END_SECONDS = 12.0
"""For the others to end after one has failed. The launcher asks them one after the other, half a minute each."""


def launch(config: str, overrides: Sequence[str], num_ranks: int, run_dir: Path, *, has_gpu: bool) -> int:
    failures.forget(run_dir)
    env = child_environment(num_ranks, has_gpu=has_gpu, launched_at=local_ranks.process_began())
    # What `deepspeed` itself starts on each node: it would load torch once more, only to find that there is one.
    nodes = {"localhost": visible_gpus()[:num_ranks] if has_gpu else list(range(num_ranks))}
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--no_local_rank", "--log_level=critical"]
    command += [f"--world_info={base64.urlsafe_b64encode(orjson.dumps(nodes)).decode()}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={env['MASTER_PORT']}"]
    command += ["--module", local_ranks.TRAINER, config, *overrides]
    requested: list[int] = []
    for number in (*STOP_SIGNALS, SAVE_SIGNAL):
        signal.signal(number, lambda got, _frame: requested.append(got))
    # A session of its own: Ctrl-C reaches the ranks through us alone, once.
    launcher = subprocess.Popen(command, env=env, start_new_session=True)
    failed_at: float | None = None
    try:
        while launcher.poll() is None:
            # To a rank: the launcher would answer a signal by killing the ranks in the middle of their save.
            if requested and local_ranks.signal_one(_ranks(launcher.pid), requested[0]):
                requested.pop(0)
            if (first := failures.read(run_dir, start_name(env))) is not None:
                local_ranks.kill_stopped(_ranks(launcher.pid))
                failed_at = failed_at or time.monotonic()
                if first.exit_code != EXIT_PREEMPTED and time.monotonic() > failed_at + _END_SECONDS:
                    local_ranks.kill(_ranks(launcher.pid))
            time.sleep(_POLL_SECONDS)
    finally:
        orphans = _ranks(launcher.pid)
        local_ranks.end(orphans)
    return resolve_exit_code(launcher.returncode, len(orphans), failures.read(run_dir, start_name(env)))


def _ranks(launcher: int) -> list[psutil.Process]:
    """The trainers of the launcher's session (it may have ended before them)."""
    return local_ranks.find_ranks(lambda process: os.getsid(process.pid) == launcher)


def resolve_exit_code(status: int, num_orphans: int, first: failures.Failure | None) -> int:
    """A launcher's status in our codes: the first cause counts, not what followed it. Standard error tells why."""
    if status == 0 and not num_orphans and first is None:
        return 0
    if first is not None and first.exit_code != EXIT_PREEMPTED:
        return first.exit_code
    if num_orphans:
        sys.stderr.write("The `deepspeed` launcher died; its ranks have been stopped. Start the run again.\n")
        return EXIT_RANK
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

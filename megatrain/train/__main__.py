"""The trainer as a module: what every launcher starts, once a rank, and `megatrain train` too.

deepspeed --module megatrain.train CONFIG [KEY=VALUE...]       srun ... python -m megatrain.train CONFIG
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

from megatrain.checkpoint.lock import Lease, folders_of, locked
from megatrain.checkpoint.origin import load
from megatrain.config import RunConfig
from megatrain.distributed import causes, failures
from megatrain.distributed.binding import bind
from megatrain.distributed.bootstrap import (
    RankInfo,
    export_rank,
    extensions_dir,
    is_start_named,
    job_identity,
    read_rank,
    start_name,
    supervisor_pid,
)
from megatrain.distributed.build_locks import clear_stale_locks
from megatrain.distributed.liveness import LivenessMonitor
from megatrain.distributed.signals import Requests
from megatrain.errors import EXIT_BUG, EXIT_OK, EXIT_RANK, MegatrainError
from megatrain.plan import rules
from megatrain.plan.fitting import out_of_memory_advice
from megatrain.train.config_record import refuse_record_of_another_run
from megatrain.train.start_clock import StartClock


def main(arguments: list[str]) -> int:
    """Train as this rank of the config named in ``arguments``; the exit code."""
    clock = StartClock()
    stop = Requests()  # first of all: a signal while torch is being imported must not be lost
    rank, run_dir, config = None, None, None
    try:
        rank = read_rank()
        bind(rank)
        if (supervisor := supervisor_pid()) is not None:
            stop.follow(supervisor)
        path, *overrides = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))] or [""]
        config = load(path, overrides)
        rules.check(config, rank.world_size)
        refuse_record_of_another_run(Path(path), config, overrides)
        clock.lap("config")
        with contextlib.ExitStack() as held:
            lease = None
            if rank.rank == 0:
                folders = folders_of(Path(config.run.dir), config.checkpoint.dir)
                lease, *_ = [held.enter_context(locked(folder, job_identity())) for folder in folders]
            clock.lap("lock")
            run_dir = Path(config.run.dir)  # ours from here on: failures are recorded there
            if rank.rank == 0 and not is_start_named():  # else whoever starts the ranks has done so
                failures.forget(run_dir)
            end_rank, must_end = partial(_end_rank, rank, run_dir), partial(_must_end, stop, rank, run_dir)
            liveness_monitor = held.enter_context(LivenessMonitor(rank, run_dir, start_name(), end_rank, must_end))
            return _train(config, rank, run_dir, stop, lease, clock, liveness_monitor, overrides)
    except MegatrainError as error:
        return _fail(rank, run_dir, error.exit_code, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown, recorded, and ends the rank
        code, message = _explain(error, rank, config)
        return _fail(rank, run_dir, code, message)


def _train(
    config: RunConfig,
    rank: RankInfo,
    run_dir: Path,
    stop: Requests,
    lease: Lease | None,
    clock: StartClock,
    liveness_monitor: LivenessMonitor,
    overrides: list[str],
) -> int:
    export_rank(rank)
    from megatrain.observe.logs import setup_logging
    from megatrain.train.start import train

    setup_logging(run_dir, rank.rank, console=rank.rank == 0)
    clock.lap("imports")
    for told in clear_stale_locks(extensions_dir()) if rank.local_rank == 0 else ():
        logging.getLogger(__name__).warning("%s", told)
    train(config, rank, stop, lease, clock, liveness_monitor, overrides)
    return EXIT_OK


def _explain(error: Exception, rank: RankInfo | None, config: RunConfig | None) -> tuple[int, str]:
    """The exit code and what to tell the user: one paragraph, and for a bug, ours or a library's, the traceback."""
    logging.getLogger("megatrain").info("an error that ends this rank", exc_info=error)
    who = f"Rank {rank.rank if rank else '?'} on {socket.gethostname()}"
    code, message = causes.explain(error, who) or (EXIT_BUG, "")
    if causes.find_cause(error) is causes.Cause.MEMORY and rank is not None and config is not None:
        from megatrain.distributed.device import memory_bytes

        memory = memory_bytes(rank.local_world_size)
        message = f"{message} {out_of_memory_advice(config, rank.world_size, rank.local_world_size, memory)}"
    return code, f"{traceback.format_exc()}{message}" if code == EXIT_BUG else message


def _fail(rank: RankInfo | None, run_dir: Path | None, exit_code: int, message: str) -> int:
    number = rank.rank if rank else 0
    logging.getLogger("megatrain").log(logging.INFO, "rank %d ends with code %d: %s", number, exit_code, message)
    failure = failures.Failure(number, exit_code, message)
    if number == 0 if run_dir is None else failures.claim(run_dir, start_name(), failure):
        sys.stderr.write(message.rstrip() + "\n")
    return exit_code


def _end_rank(rank: RankInfo, run_dir: Path, report: str) -> None:
    """Another rank has died or is stuck, and this one may wait for it where nothing reaches it."""
    code = _fail(rank, run_dir, EXIT_RANK, report)
    sys.stderr.flush()
    os._exit(code)


def _must_end(stop: Requests, rank: RankInfo, run_dir: Path) -> bool:
    """By a signal; or because this start has failed, for which one rank of each node looks."""
    if stop.must_end:
        return True
    return rank.local_rank == 0 and is_start_named() and failures.read(run_dir, start_name()) is not None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)  # threads and process groups of a broken run must not keep the rank from ending

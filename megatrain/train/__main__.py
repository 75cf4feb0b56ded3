"""The trainer as a module: what every launcher starts, once a rank. `megatrain train` starts it through `deepspeed`.

deepspeed --module megatrain.train CONFIG [KEY=VALUE...]       srun ... python -m megatrain.train CONFIG
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path

from megatrain.checkpoint.lock import Lease, locked
from megatrain.config import RunConfig, load
from megatrain.distributed import failures
from megatrain.distributed.bootstrap import (
    RankInfo,
    bind_cores,
    export_rank,
    extensions_dir,
    job_identity,
    read_rank,
    start_name,
    supervisor_pid,
)
from megatrain.distributed.build_locks import clear_stale_locks
from megatrain.distributed.signals import Requests
from megatrain.errors import EXIT_BUG, EXIT_OK, MegatrainError, RankError
from megatrain.plan import rules
from megatrain.train.start_clock import StartClock


def main(arguments: list[str]) -> int:
    """Train as this rank of the config named in ``arguments``; the exit code."""
    clock = StartClock()
    stop = Requests()  # first of all: a signal while torch is being imported must not be lost
    rank, run_dir = None, None
    try:
        rank = read_rank()
        bind_cores(rank)
        if (supervisor := supervisor_pid()) is not None:
            stop.follow(supervisor)
        path, *overrides = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))] or [""]
        config = load(path, overrides)
        rules.check(config, rank.world_size)
        clock.lap("config")
        with contextlib.ExitStack() as held:
            lease = None
            if rank.rank == 0:
                lease = held.enter_context(locked(Path(config.run.dir), job_identity()))
            clock.lap("lock")
            run_dir = Path(config.run.dir)  # ours from here on: failures are recorded there
            return _train(config, rank, run_dir, stop, lease, clock)
    except MegatrainError as error:
        return _fail(rank, run_dir, error.exit_code, str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown, recorded, and ends the rank
        if _is_lost_peer(error):
            lost = RankError(
                f"Rank {rank.rank if rank else '?'} lost the others in the middle of a step: another rank or its node "
                f"died, or does not answer ({str(error).splitlines()[0][:200]}). Start the run again: it goes on from "
                "the newest checkpoint."
            )
            return _fail(rank, run_dir, lost.exit_code, str(lost))
        return _fail(rank, run_dir, EXIT_BUG, traceback.format_exc())


def _train(
    config: RunConfig, rank: RankInfo, run_dir: Path, stop: Requests, lease: Lease | None, clock: StartClock
) -> int:
    export_rank(rank)
    from megatrain.observe.logs import setup_logging
    from megatrain.train.start import train

    if rank.rank == 0:
        failures.forget(run_dir)
    setup_logging(run_dir, rank.rank, console=rank.rank == 0)
    clock.lap("imports")
    for told in clear_stale_locks(extensions_dir()) if rank.local_rank == 0 else ():
        logging.getLogger(__name__).warning("%s", told)
    train(config, rank, stop, lease, clock)
    return EXIT_OK


def _fail(rank: RankInfo | None, run_dir: Path | None, exit_code: int, message: str) -> int:
    number = rank.rank if rank else 0
    logging.getLogger("megatrain").log(logging.INFO, "rank %d ends with code %d: %s", number, exit_code, message)
    failure = failures.Failure(number, exit_code, message)
    if number == 0 if run_dir is None else failures.claim(run_dir, start_name(), failure):
        sys.stderr.write(message.rstrip() + "\n")
    return exit_code


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective ended because a peer died or no longer answers: gloo and NCCL say so in their own words."""
    text = str(error)
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "NCCL",
        "gloo",
    )
    return isinstance(error, RuntimeError) and any(word in text for word in words)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)  # threads and process groups of a broken run must not keep the rank from ending

"""What a batch script asks before and after its ranks, and how it reaches them.

RUN/logs/restarts.json remembers from one start of a SLURM job to the next whether the run gets anywhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson
import psutil

from launcher.submit import cancel_chain
from megatrain.checkpoint.location import locate
from megatrain.checkpoint.lock import refuse_if_locked
from megatrain.checkpoint.origin import find_origin
from megatrain.config import RunConfig
from megatrain.distributed import failures, local_ranks
from megatrain.distributed.bootstrap import job_identity, job_port, start_name
from megatrain.distributed.supervisor import resolve_exit_code
from megatrain.errors import EXIT_PREEMPTED, EXIT_RANK, ConfigError, RankError

_FILE = "restarts.json"
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Restarts:
    """How the starts of a SLURM job went. ``newest_step``: of the run's newest checkpoint as the last one began, None
    without one; ``num_fruitless``: starts in a row before it that left none; ``was_asked``: it ended on request.
    """

    newest_step: int | None = None
    num_fruitless: int = 0
    was_asked: bool = False

    def next(self, newest_step: int | None) -> Restarts:
        fruitful = self.was_asked or newest_step != self.newest_step
        return Restarts(newest_step, 0 if fruitful else self.num_fruitless + 1)

    @classmethod
    def read(cls, run_dir: Path) -> Restarts | None:
        try:
            return cls(**orjson.loads((run_dir / "logs" / _FILE).read_bytes()))
        except (OSError, orjson.JSONDecodeError, TypeError):
            return None

    def write(self, run_dir: Path) -> None:
        """Leave it to the next start. A disk that cannot take it does not stop the run."""
        with contextlib.suppress(OSError):
            (run_dir / "logs" / _FILE).write_bytes(orjson.dumps(asdict(self)))


def begin_job(config: RunConfig, tries: int) -> int:
    """Make the run ready for this start of the job; the port to meet at.

    Raises CheckpointError where another job holds the run folder, or what run.init_from names does not fit, RankError
    where ``tries`` starts led nowhere.
    """
    run_dir, job = Path(config.run.dir), job_identity()
    if "slurm_job" not in job:
        raise ConfigError("SLURM_JOB_ID is not set: this is for batch scripts, inside their job.")
    refuse_if_locked(run_dir, job)
    if (origin := find_origin(config)) is not None:
        origin.refuse_other_model(config.model)
        origin.refuse_other_adapters(config.lora)
    start = int(job.get("slurm_restarts", "0"))
    before, newest = Restarts.read(run_dir) if start else None, newest_step(run_dir, config.checkpoint.dir)
    restarts = before.next(newest) if before else Restarts(newest)
    if restarts.num_fruitless >= tries:
        raise RankError(
            f"{tries} starts in a row left no new checkpoint in {run_dir}: the job is given up. The output above and "
            f"{run_dir / 'logs'} say why the ranks failed; mend it and submit the job again."
        )
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs" / "environment.sh").unlink(missing_ok=True)  # of a start whose node lost power
    restarts.write(run_dir)
    failures.forget(run_dir)
    return job_port(int(job["slurm_job"]), start)


def end_job(config: RunConfig, status: int, tries: int) -> tuple[str, int]:
    """After the ranks' launcher has ended with ``status``: "requeue" or "stop", and the exit code of the first cause.

    Waits for the ranks of this node that outlived their launcher, after asking them to save and stop.
    """
    run_dir = Path(config.run.dir)
    orphans = _ranks()
    local_ranks.end(orphans)
    first = failures.read(run_dir, start_name())
    restarts = Restarts.read(run_dir) or Restarts()
    if first is not None and first.exit_code == EXIT_PREEMPTED:
        # A rank says so only when the state of all is saved, whatever its launcher made of it.
        replace(restarts, was_asked=True).write(run_dir)
        return "requeue", EXIT_PREEMPTED
    if orphans and first is None:
        sys.stderr.write("What had started the ranks died; they have been stopped.\n")
        code = EXIT_RANK
    else:
        code = resolve_exit_code(status, first)
    if code != EXIT_RANK:
        return "stop", code
    is_left = restarts.next(newest_step(run_dir, config.checkpoint.dir)).num_fruitless < tries
    if not is_left:
        sys.stderr.write(f"{tries} starts in a row left no new checkpoint: the job is given up.\n")
    return "requeue" if is_left else "stop", code


def cancel_rest() -> None:
    if rest := cancel_chain(os.environ.get("SLURM_JOB_ID", "")):
        sys.stderr.write(f"The rest of the chain is cancelled: {' '.join(reversed(rest))}.\n")


def relay_signal(name: str, script: int) -> None:
    """Send a signal to a rank of this job on this node, which tells the others; waits until one is there and listens.

    Gives up when the batch script, the process ``script``, has ended. Raises ConfigError for a name that no signal has.
    """
    try:
        number = signal.Signals[f"SIG{name.removeprefix('SIG')}"]
    except KeyError:
        raise ConfigError(f"{name} is no signal; give one such as USR1 or TERM.") from None
    while psutil.pid_exists(script) and not local_ranks.signal_one(_ranks(), number):
        time.sleep(_LOOK_SECONDS)


def end_leftovers() -> None:
    """KILL the ranks that an earlier start of this job left on this node: superseded, they have nothing to save."""
    job, start = _start_of(os.environ)
    for process in local_ranks.find_ranks(lambda process: _is_earlier(_start_of(process.environ()), job, start)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def ignore_termination() -> None:
    """SLURM sends TERM to all processes of a job; what still has to reach the ranks, or report of them, goes on."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _ranks() -> list[psutil.Process]:
    ours = _start_of(os.environ)
    return local_ranks.find_ranks(lambda process: _start_of(process.environ()) == ours)


def _start_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """The SLURM job that a process belongs to, and how often it had been restarted."""
    return environ.get("SLURM_JOB_ID", ""), int(environ.get("SLURM_RESTART_COUNT", "0"))


def _is_earlier(start: tuple[str, int], job: str, restarts: int) -> bool:
    return bool(job) and start[0] == job and start[1] < restarts


def newest_step(run_dir: Path, checkpoint_dir: str | None) -> int | None:
    """Of the run's checkpoints, by their names alone: what reads them properly imports torch."""
    folder = locate(checkpoint_dir) if checkpoint_dir else run_dir / "checkpoints"
    names = [path.parent.name.partition(".")[0] for path in folder.glob("step-*/manifest.json")]
    return max((int(name.removeprefix("step-")) for name in names), default=None)

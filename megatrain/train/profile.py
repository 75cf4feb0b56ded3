"""`megatrain profile`: some steps of a config under torch.profiler, as the trainer makes them.

Left out is what stands between steps: metrics, evaluation, saves. The weights are the initial ones and stay so, at a
learning rate of 0. Nothing is written but the folder that is asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
import socket
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import orjson
import torch
from torch.profiler import ProfilerActivity, record_function

from megatrain.atomic import commit_bytes
from megatrain.config import RunConfig
from megatrain.data.batches import TrainingBatches
from megatrain.distributed import causes
from megatrain.distributed.bootstrap import RankInfo
from megatrain.errors import ConfigError, MegatrainError, RankError
from megatrain.observe.logs import adopt_logger
from megatrain.observe.memory import peak_memory_bytes
from megatrain.observe.profile import RankProfile
from megatrain.observe.trace import break_down
from megatrain.parallel.engine import StepResult
from megatrain.ranges import DATA, EXCHANGE, STEP
from megatrain.train.assemble import Run, assemble
from megatrain.train.garbage import collected_on_request
from megatrain.train.preview import PROFILE_FILE
from megatrain.train.spikes import NOTHING_YET, SpikeDetector

_NUM_WARM = 3
_SCRATCH = ".run"  # in place of the run's folder


def profile(config: RunConfig, rank: RankInfo, num_steps: int, out: Path) -> list[RankProfile]:
    """Profile ``num_steps`` steps after some to warm up. Writes into ``out`` a trace of the first rank of each pipeline
    stage, and what they give (PROFILE_FILE), which is also the result. Collective.

    Raises RankError for what an error of torch or of the ranks' communication means.
    """
    adopt_logger("DeepSpeed")
    scratch = out / _SCRATCH
    with _writing(out):
        scratch.mkdir(parents=True, exist_ok=True)
    try:
        run = assemble(_apart(config, scratch), rank)
        with contextlib.closing(run.engine):
            _fill(run)
            own = _profile(run, num_steps, out)
        found = [each for each in run.groups.all_gather_object(own) if each is not None]
        if rank.rank == 0:
            with _writing(out):
                commit_bytes(out / PROFILE_FILE, orjson.dumps([each.to_json() for each in found]))
    except Exception as error:
        told = causes.explain(error, f"Rank {rank.rank} on {socket.gethostname()}")
        if isinstance(error, MegatrainError) or told is None:
            raise
        raise RankError(told[1]) from error
    finally:
        if rank.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    return found


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}.") from None


def _apart(config: RunConfig, scratch: Path) -> RunConfig:
    """The same run in another folder."""
    changed = {
        "run": config.run.model_copy(update={"dir": str(scratch)}),
        "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
    }
    return config.model_copy(update=changed)


def _fill(run: Run) -> None:
    if run.config.lora is not None:
        run.engine.load_frozen(run.initial_weights)
    run.engine.load_fragments(run.initial_weights, num_updates=0)
    run.engine.sync_params_from_master()


def _profile(run: Run, num_steps: int, out: Path) -> RankProfile | None:
    """On the first rank of each pipeline stage what its trace says."""
    groups, engine = run.groups, run.engine
    names = engine.name_modules()
    with contextlib.closing(run.training_batches(run.order)) as batches:
        steps = _Steps(run, batches)
        if engine.is_compiled:
            engine.compile(batches.micro_batches(0)[0])
        steps.take(_NUM_WARM)
        with collected_on_request():
            plain_seconds = steps.take(num_steps)
            if groups.coordinate.data or groups.coordinate.tensor:
                steps.take(1 + num_steps)
                return None
            with _profiler(groups.device) as profiler:
                steps.take(1)  # what the profiler itself has to do at first
                profiler.step()
                steps.take(num_steps)
    trace = out / f"rank-{run.rank.rank:05d}.json.gz"
    unpacked = out / _SCRATCH / trace.stem
    with _writing(out):
        profiler.export_chrome_trace(str(unpacked))
        data = unpacked.read_bytes()
        commit_bytes(trace, gzip.compress(data, compresslevel=4))
    is_gpu = groups.device.type == "cuda"
    return RankProfile(
        rank=run.rank.rank,
        stage=groups.coordinate.pipeline,
        device=torch.cuda.get_device_name(groups.device) if is_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        is_gpu=is_gpu,
        num_steps=num_steps,
        plain_seconds=plain_seconds,
        peak_memory_bytes=peak_memory_bytes(groups.device),
        trace=trace.name,
        steps=break_down(orjson.loads(data), names),
    )


def _profiler(device: torch.device) -> torch.profiler.profile:
    """Records from its first ``step()`` on."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
    return torch.profiler.profile(activities=activities, schedule=schedule, profile_memory=True)


class _Steps:
    """The steps of a run, one after the other."""

    def __init__(self, run: Run, batches: TrainingBatches) -> None:
        self._run, self._batches = run, batches
        self._spikes = SpikeDetector(run.config.spikes, run.groups, NOTHING_YET)
        self._num_done = 0
        self._results: list[StepResult] = []  # since the last exchange

    def take(self, count: int) -> float:
        """Make so many, and wait for the device; the seconds of each."""
        self._wait()
        began = time.perf_counter()
        for left in reversed(range(count)):
            with record_function(STEP):
                self._make()
                if not left:
                    self._wait()
        return (time.perf_counter() - began) / count

    def _make(self) -> None:
        run, number = self._run, self._num_done
        with record_function(DATA):
            micro_batches, count = self._batches.micro_batches(number), self._batches.num_targets(number)
        divisor = max(count, 1)
        self._results.append(run.engine.train_batch(micro_batches, divisor, 0.0, self._spikes.guard(divisor)))
        self._num_done += 1
        if self._num_done % run.config.observe.log_every_steps == 0:
            with record_function(EXCHANGE):
                figures = [(each.loss_sum, each.grad_norm, each.skipped) for each in self._results]
                run.groups.all_reduce_sum(torch.stack([x.double() for x in chain.from_iterable(figures)]))
                self._results = []

    def _wait(self) -> None:
        if self._run.groups.device.type == "cuda":
            torch.cuda.synchronize(self._run.groups.device)

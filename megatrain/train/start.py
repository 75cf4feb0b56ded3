"""From a checked config to a finished run, on one rank."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatrain.checkpoint.lock import Lease
from megatrain.config import RunConfig
from megatrain.config.schema import ParallelConfig
from megatrain.data.epochs import Epochs, epochs_of
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.liveness import LivenessMonitor
from megatrain.distributed.signals import Requests
from megatrain.distributed.topology import Topology
from megatrain.errors import Diverged
from megatrain.observe.callbacks import Callback
from megatrain.observe.goodput import GoodputLedger
from megatrain.observe.logs import adopt_logger, log_path
from megatrain.observe.observers import Observers
from megatrain.parallel.compile_cache import compiled_graphs
from megatrain.plan.flops import num_parameters, num_trained_parameters
from megatrain.train.assemble import Run, assemble, computes_bf16
from megatrain.train.checkpointing import restore, rewind
from megatrain.train.config_record import record_new_run
from megatrain.train.progress import Progress, begun_segment, resume_changes
from megatrain.train.spikes import SpikeError
from megatrain.train.start_clock import StartClock
from megatrain.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    rank: RankInfo,
    stop: Requests,
    lease: Lease | None = None,
    clock: StartClock | None = None,
    liveness_monitor: LivenessMonitor | None = None,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> Progress:
    """Train to the config's last step, from the newest good checkpoint if there is one. Collective.

    ``lease``: of the run folder, on rank 0. ``clock``: began with this process. ``liveness_monitor``: ends the
    ranks where one is stuck. ``overrides``: the KEY=VALUE that the config was given on the command line.
    ``callbacks``: called on rank 0. Raises Preempted after a request to stop, once the state is saved.
    """
    adopt_logger("DeepSpeed")
    clock = clock or StartClock()
    run = assemble(config, rank, clock)
    run.overrides = tuple(overrides)
    if liveness_monitor is not None:
        log = log_path(Path(config.run.dir), rank.rank)
        liveness_monitor.watch(run.groups.activity, run.config.train.hang_timeout_seconds, log)
    if rank.rank == 0 and run.config.train.precision == "bf16" and (other := _instead_of_bf16(run.groups.device)):
        logger.warning("%s has no units for bf16, and takes many times as long: set train.precision=%s", *other)
    ledger = GoodputLedger(Path(config.run.dir), clock.began) if rank.rank == 0 else None
    progress, folder, complaints = restore(run)
    clock.lap("restore")
    if run.engine.is_compiled and progress.step < run.num_steps:
        _compile(run, progress)
        clock.lap("compile")
    if rank.rank == 0:
        record_new_run(run.config)
    resumed_from = str(folder.path) if folder else None
    while True:
        with _observed(run, progress, resumed_from, complaints, clock, ledger, callbacks) as observers:
            trainer = Trainer(run, progress, stop, observers, lease)
            with _divergence_reported(observers, trainer):
                try:
                    return trainer.run()
                except SpikeError as spike:
                    clock = None  # what comes now is no start
                    run.groups.activity.enter(spike.step, "start")
                    progress, complaints = rewind(run, trainer.progress, spike)
                    resumed_from = str(run.store.path_of(progress.step))


def _compile(run: Run, progress: Progress) -> None:
    """Compile the layers for micro-batches like the first one, on all ranks at once."""
    run.groups.activity.enter(progress.step, "compile")
    with contextlib.closing(run.training_batches(run.order)) as batches:
        run.engine.compile(batches.micro_batches(progress.step)[0])
    run.compiled = compiled_graphs()
    run.groups.activity.enter(progress.step, "start")


@contextlib.contextmanager
def _observed(
    run: Run,
    progress: Progress,
    resumed_from: str | None,
    complaints: Sequence[str],
    clock: StartClock | None,
    ledger: GoodputLedger | None,
    callbacks: Sequence[Callback],
) -> Iterator[Observers | None]:
    """On rank 0 what watches the run from ``progress`` on, told how it came there."""
    if run.rank.rank != 0:
        yield None
        return
    config = run.config
    run_dir, observe = Path(config.run.dir), config.observe
    places = (observe.tensorboard, ledger, callbacks, observe.trackers)
    with Observers(run_dir, run.num_steps, progress.step, *places) as observers:
        if clock is not None:
            clock.lap("observers")
        changes = resume_changes(run.former, config, progress.step, run.order) if run.former and clock else {}
        startup = clock.parts if clock else {}
        observers.start(_facts(run, resumed_from), startup, progress.training_seconds, changes)
        for finding in run.findings if clock is not None else ():
            observers.event("preflight", progress.step, finding.text)
        for each in _epochs(run) if clock is not None else ():
            if each.warning:
                observers.event("epochs", progress.step, each.warning)
        validated = (source for each in run.validation.values() for source in each.sources)
        for path, text in {(s.dataset.path, s.left_out): None for s in (*run.maker.sources, *validated)}:
            if text is not None and clock is not None:
                observers.event("packing", progress.step, f"{path}: {text}")
        for complaint in complaints:
            observers.event("damaged checkpoint", progress.step, f"passed over a damaged checkpoint: {complaint}")
        if progress.rewinds and progress.rewinds[-1].to_step == progress.step:
            observers.event("rewind", progress.step, progress.rewinds[-1].text())
        if (change := begun_segment(progress)) is not None:
            observers.event("data order", progress.step, change)
        yield observers


@contextlib.contextmanager
def _divergence_reported(observers: Observers | None, trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except Diverged as error:
        if observers:
            observers.end("diverged", trainer.progress.step, f"gave up: {error}")
        raise


def _instead_of_bf16(device: torch.device) -> tuple[str, str] | None:
    """What a device without units for bf16 calls itself, and the precision for it; None where it has them."""
    if computes_bf16(device):
        return None
    return (torch.cuda.get_device_name(device), "fp16") if device.type == "cuda" else ("This machine's CPU", "fp32")


def _facts(run: Run, resumed_from: str | None) -> dict[str, str]:
    config, topology = run.config, run.groups.topology
    device = run.groups.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread(s) a rank"
    )
    trained = f", {num_trained_parameters(config.model, config.lora):,} in adapters" if config.lora else ""
    count = f"{num_parameters(config.model):,} parameters{trained}"
    facts = {
        "model": f"{config.model.family}, {count}, {config.train.precision}",
        "layout": layout_in_words(config.parallel, topology),
        "device": name,
        "kernels": _kernels_in_words(run),
        "data": ", ".join(
            f"{dataset.path} ({dataset.amount}, {each.epochs:.2f} epochs)"
            for dataset, each in zip(run.datasets, _epochs(run), strict=True)
        ),
        "run": config.run.dir,
    }
    facts |= {"init_from": str(run.origin)} if run.origin else {}
    return facts | ({"resumed from": resumed_from} if resumed_from else {})


def _kernels_in_words(run: Run) -> str:
    """What computes attention, and whether layers are compiled."""
    is_written_out = run.config.model.attention_dropout > 0 or run.groups.device.type == "cpu"
    default = "in blocks of rows" if is_written_out else "PyTorch's choice"
    attention = default if run.attention == "auto" else run.attention
    compiled = f"compiled: {run.compiled.text}" if run.compiled else "not compiled"
    deterministic = ", deterministic" if run.config.train.deterministic else ""
    return f"attention {attention}, layers {compiled}{deterministic}"


def layout_in_words(parallel: ParallelConfig, topology: Topology) -> str:
    """What a start shows and records about its layout."""
    chunks = f" in {parallel.pipeline_chunks} chunks" if parallel.pipeline_chunks > 1 else ""
    return (
        f"{topology.world_size} rank(s): data {topology.data} x tensor {topology.tensor} x pipeline "
        f"{topology.pipeline}{chunks}, {parallel.engine}, ZeRO {parallel.zero_stage}, recompute {parallel.recompute}"
    )


def _epochs(run: Run) -> list[Epochs]:
    return epochs_of(run.order, run.num_steps, run.datasets)

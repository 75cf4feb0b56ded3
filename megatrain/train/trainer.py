"""The loop: one global batch a step, now and then an evaluation or a save, until it is done or asked to stop."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatrain.checkpoint.lock import Lease
from megatrain.checkpoint.saver import SaveResult, SaveStatus
from megatrain.data import Dataset
from megatrain.data.batches import TrainingBatches
from megatrain.distributed.signals import Requests
from megatrain.errors import CheckpointError, Diverged, MegatrainError, Preempted, RankError
from megatrain.inference.writer import Writer, agreement
from megatrain.observe.flops import mfu, peak_flops
from megatrain.observe.memory import peak_memory_bytes
from megatrain.observe.metrics import METRICS_FILE, Spread, StepMetrics
from megatrain.observe.observers import Observers
from megatrain.parallel.engine import StepResult
from megatrain.plan.flops import flops_per_token
from megatrain.tasks.evaluation import Asked, answer, ask, collect
from megatrain.train.assemble import Run
from megatrain.train.checkpointing import CheckpointManager, assets_of
from megatrain.train.config_record import record_start
from megatrain.train.garbage import STEPS_BETWEEN, collected_on_request
from megatrain.train.progress import Progress
from megatrain.train.schedule import learning_rate
from megatrain.train.spikes import SpikeDetector, SpikeError
from megatrain.train.stragglers import StragglerDetector

logger = logging.getLogger(__name__)

SAVE_NOW = "save-now"  # a file in the run folder that asks for a checkpoint


class ControlFlags(NamedTuple):
    """What steps are to be followed by, on request or by the clock: the end, a save, a comparison of the ranks."""

    stop: bool
    save: bool
    compare: bool


class _Begun(NamedTuple):
    """A step whose figures are still on the device."""

    num_targets: int
    divisor: int
    lr: float
    result: StepResult


class _Fetched(NamedTuple):
    """What the steps since the last fetch did, the same on all ranks; loss, norm and rate are the last one's."""

    num_steps: int
    num_targets: int
    loss: float
    grad_norm: float
    lr: float
    flags: ControlFlags


@dataclass
class Stopwatch:
    """Where the time since the last lap went, by part."""

    on_enter: Callable[[str], None]
    parts: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self.on_enter(part)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began

    def move(self, seconds: float, source: str, target: str) -> None:
        self.parts[source] -= seconds
        self.parts[target] = self.parts.get(target, 0.0) + seconds

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap and its parts, with "other" for the rest; start the next lap."""
        now = time.perf_counter()
        seconds, parts = now - self._began, self.parts
        parts["other"] = max(seconds - sum(parts.values()), 0.0)
        self.parts, self._began = {}, now
        return seconds, parts


class Trainer:
    """Trains a run from where ``progress`` stands. ``observers`` and ``lease``: on rank 0 alone.

    A step reads nothing back from the device. All figures and requests are fetched together, in one exchange of the
    ranks, after each step that is logged, evaluated or saved; ``progress`` counts the steps that were fetched.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        requests: Requests,
        observers: Observers | None,
        lease: Lease | None = None,
    ) -> None:
        self._run, self._config = run, run.config
        self.progress = progress
        self._requests, self._observers, self._lease = requests, observers, lease
        self._num_steps = run.num_steps
        self._begun: list[_Begun] = []  # since the last fetch
        self._save_now = Path(run.config.run.dir) / SAVE_NOW
        self._validation_loss: float | None = None
        self._checkpoints = CheckpointManager(run, progress.updates)
        self._writer = self._make_writer() if run.questions else None
        self._asked = self._ask(self._writer) if self._writer else []
        self._spikes = SpikeDetector(run.config.spikes, run.groups, progress.recent)
        self._watch = Stopwatch(self._note_part)
        config = run.config
        lengths = config.data.seq_len, config.lora, config.predicted_share, config.target_len
        self._flops_per_token = flops_per_token(config.model, *lengths)
        self._peak = peak_flops(run.groups.device, run.config.observe.peak_flops) if observers else None
        self._first_step = progress.step
        self._was_mended = False
        self._stragglers = StragglerDetector(run.groups)
        self._compare_at = time.monotonic() + run.config.observe.straggler_report_seconds

    def _make_writer(self) -> Writer:
        """What answers train.tasks: the engine, with the tokenizer and the small files of its checkpoints."""
        run = self._run
        assets = run.groups.run_on_rank0(lambda: assets_of(run))
        texts = run.datasets[0]
        assert isinstance(texts, Dataset), "megatrain.config.checks refuses tasks of models that read images"
        return Writer(run.engine, texts.tokenizer, assets, agreement(run.groups))

    def _ask(self, writer: Writer) -> list[Asked]:
        """train.tasks as token ids: one that cannot be asked is told before the first step."""
        asked, problem = [], None
        try:
            asked = ask(self._run.questions, writer, self._run.groups)
        except MegatrainError as error:
            problem = error
        if (first := self._run.groups.first_value(problem)) is not None:
            raise first
        return asked

    def _note_part(self, part: str) -> None:
        self._run.groups.activity.enter(self._num_begun, part)

    @property
    def _num_begun(self) -> int:
        return self.progress.step + len(self._begun)

    def run(self) -> Progress:
        """Train to the last step, or until the validation loss does not get better.

        Raises Preempted once state is saved after a request to stop, CheckpointError where it could not be saved,
        Diverged where it is ruined or too many updates were left out in a row, SpikeError where the run is to go back
        for a spike.
        """
        batches, stopping = self._run.training_batches(self._run.order), False
        with contextlib.ExitStack() as held:
            held.callback(batches.close)
            if self._observers:
                held.enter_context(self._requests.saving_by(self._save_now))
            try:
                while not self._is_over and not stopping:
                    self._step(batches)
                    if self._num_begun == self._first_step + 1:
                        self._checkpoints.prepare()
                        if self._observers:
                            record_start(self._config, self._first_step)
                        held.enter_context(collected_on_request())
                    if self._is_fetch_due():
                        stopping = self._follow(self._fetch())
                    if self._num_begun % STEPS_BETWEEN == 0:
                        gc.collect()
            except SpikeError:
                self._report_saves(self._checkpoints.finish())
                self._checkpoints.close(prune=False)
                raise
        self._end(stopping)
        return self.progress

    def _is_fetch_due(self) -> bool:
        """Whether figures are to be looked at after the last step, the same on all ranks."""
        config, step = self._config, self._num_begun
        compared = config.train.check_replica_hash_interval or self._num_steps
        every = (config.train.eval_every_steps, config.checkpoint.every_steps, compared)
        return self._is_logged(step) or config.spikes.action != "none" or any(step % each == 0 for each in every)

    def _follow(self, fetched: _Fetched) -> bool:
        """Do what is due after these steps; whether the run is to end early."""
        self._evaluate_if_due()
        # Before the save: a step that a checkpoint holds is one that was logged.
        self._report(fetched)
        self._refuse_to_go_on_without_updates()
        self._save_if_due(fetched.flags.stop, fetched.flags.save)
        return fetched.flags.stop

    def _step(self, batches: TrainingBatches) -> None:
        run, step, watch = self._run, self._num_begun, self._watch
        lr = learning_rate(self._config.schedule, self._config.optimizer.lr, step, self._num_steps)
        with watch.measure("data"):
            micro_batches, count = batches.micro_batches(step), batches.num_targets(step)
        with watch.measure("forward_backward"):
            divisor = max(count, 1)  # samples of prompts alone have no target, and teach nothing
            result = run.engine.train_batch(micro_batches, divisor, lr, self._spikes.guard(divisor))
        watch.move(result.optimizer_seconds, "forward_backward", "optimizer")
        self._begun.append(_Begun(count, divisor, lr, result))

    def _fetch(self) -> _Fetched:
        """Wait for the device, once, for all that is to be known of the steps since the last time. Collective."""
        steps = self._begun
        with self._watch.measure("exchange"):
            # One exchange: the figures, what is requested, and how far the current save is.
            requested = torch.tensor([*self._own_flags(), *self._checkpoints.status()], dtype=torch.float64)
            figures = [self._own_figures(step.result) for step in steps]
            sums = self._run.groups.all_reduce_sum(torch.cat([*figures, requested.to(self._run.groups.device)]))
            rows, sums = [sums[k : k + 3] for k in range(0, 3 * len(steps), 3)], sums[3 * len(steps) :]
            flags, status = ControlFlags(*(count > 0 for count in sums[:3])), SaveStatus(*sums[3:])
        if self._lease is not None:
            self._lease.check()  # a start left behind writes nothing more, not even metrics
        self._report_saves(self._checkpoints.advance(status))
        spike = self._spikes.spike
        if spike is not None and self._config.spikes.action == "rewind":
            raise SpikeError(self.progress.step, spike)
        self._begun = []
        for step, (loss_sum, _, skipped) in zip(steps, rows, strict=True):
            self.progress = self.progress.after_step(step.num_targets, bool(skipped), self._spikes.recent)
            if skipped:
                self._report_skip(loss_sum / step.divisor)
        self._checkpoints.prune_if_sound(self.progress)
        last, (loss_sum, norm, _) = steps[-1], rows[-1]
        num_targets = sum(step.num_targets for step in steps)
        return _Fetched(len(steps), num_targets, loss_sum / last.divisor, norm, last.lr, flags)

    def _own_figures(self, result: StepResult) -> torch.Tensor:
        """What this rank adds to the figures of a step, on the device: its share of the loss, and on rank 0 what is the
        same on all: the norm, and whether the update was skipped."""
        alike = [result.grad_norm, result.skipped]
        if self._run.rank.rank:
            alike = [torch.zeros_like(result.loss_sum)] * 2
        return torch.stack([x.double() for x in (result.loss_sum, *alike)])

    def _report_skip(self, loss: float) -> None:
        if self._observers is None:
            return
        scale = self._run.engine.loss_scale
        lowered = f"; the loss scale is {scale['cur_scale']:g} now" if scale else ""
        reason = self._spikes.spike or f"the gradient is not finite (loss {loss:.4g}){lowered}"
        self._observers.event("skipped", self.progress.step, f"no update in step {self.progress.step}: {reason}")

    def _refuse_to_go_on_without_updates(self) -> None:
        most = self._config.spikes.max_in_a_row
        if self.progress.skipped_in_a_row >= most:
            raise Diverged(
                f"No update could be made in the last {most} steps, up to step {self.progress.step} "
                f"({self._spikes.spike or 'gradients that are not finite'}); the events in {METRICS_FILE} say why. "
                "Look at the data and the learning rate, go back with `megatrain checkpoint rewind`, or raise "
                "spikes.max_in_a_row."
            )

    def _compare_weights(self) -> None:
        """Raise RankError, naming the ranks, where ranks that must hold the same weights do not. Between tensor ranks
        that may be rounding: the first time it is mended. Collective."""
        if (difference := self._run.engine.find_differences()) is None:
            return
        found = f"After step {self.progress.step} weights differ that must be the same: {difference.text}."
        if difference.may_drift and not self._was_mended:
            self._was_mended = True
            self._run.engine.mend_differences()
            if self._run.engine.find_differences() is None:
                if self._observers is not None:
                    self._observers.event("mended", self.progress.step, f"{found} All hold the same again.")
                return
        raise RankError(
            f"{found} A device there corrupts data silently. Nothing was saved since; start the run again without that "
            "node."
        )

    def _own_flags(self) -> ControlFlags:
        """What was requested of this rank since the last fetch."""
        due = self._run.rank.rank == 0 and time.monotonic() >= self._compare_at
        compare = due and self._is_logged(self._num_begun)  # the clock alone decides nothing that is logged
        by_callback = self._observers is not None and self._observers.is_stop_requested
        return ControlFlags(self._requests.signal is not None or by_callback, self._requests.take_save(), compare)

    def _is_logged(self, step: int) -> bool:
        return step % self._config.observe.log_every_steps == 0 or step == self._num_steps

    @property
    def _is_over(self) -> bool:
        return self._num_begun >= self._num_steps or self._stops_early

    @property
    def _stops_early(self) -> bool:
        rule = self._config.train.early_stopping
        return rule is not None and self.progress.num_worse >= rule.patience

    def _why_over(self) -> str:
        if not self._stops_early:
            return "is complete"
        progress = self.progress
        best = "" if progress.best_validation_loss is None else f" than {progress.best_validation_loss:.4f}"
        return f"has ended early: no better validation loss{best} in the last {progress.num_worse} evaluations"

    def _evaluate_if_due(self) -> None:
        run, step = self._run, self.progress.step
        self._validation_loss = None
        if step % self._config.train.eval_every_steps and step != self._num_steps:
            return
        if self._writer is not None:
            self._evaluate_tasks(self._writer)
        if not run.validation:
            return
        began = time.perf_counter()
        with self._watch.measure("eval"):
            shares = [run.engine.evaluate(each) for each in run.validation.values()]
            sums = run.groups.all_reduce_sum(torch.stack(shares))
        counts = {name: each.num_targets for name, each in run.validation.items()}
        self._validation_loss = sum(sums) / sum(counts.values())
        rule = self._config.train.early_stopping
        self.progress = self.progress.after_validation(self._validation_loss, rule.min_gain if rule else 0.0)
        if self._observers:
            losses = {name: total / counts[name] for name, total in zip(counts, sums, strict=True)}
            classifies, seconds = self._config.model.description.classifies, time.perf_counter() - began
            perplexity = None if classifies else math.exp(min(self._validation_loss, 700.0))
            self._observers.validation(step, self._validation_loss, seconds, losses, perplexity)

    def _evaluate_tasks(self, writer: Writer) -> None:
        """On all ranks. Raises what any of them raises, as for a log-likelihood that is no number."""
        run, began, problem, own = self._run, time.perf_counter(), None, []
        with self._watch.measure("eval"):
            try:
                with run.engine.in_use():
                    own = answer(self._asked, writer)
            except MegatrainError as error:
                problem = error
            if (first := run.groups.first_value(problem)) is not None:
                raise first
            results = collect(run.questions, own, run.groups)
        if self._observers:
            figures = {r.task.name: {name: each.to_json() for name, each in r.metrics.items()} for r in results}
            self._observers.tasks(self.progress.step, figures, time.perf_counter() - began)

    def _save_if_due(self, stopping: bool, on_request: bool) -> None:
        step = self.progress.step
        last = stopping or self._is_over
        in_turn = step % self._config.checkpoint.every_steps == 0 and self._checkpoints.has_updates(self.progress)
        due = last or on_request or in_turn
        every = self._config.train.check_replica_hash_interval
        if every is not None and (due or step % every == 0):
            self._compare_weights()
        if not due:
            return
        with self._watch.measure("save"):
            if self._observers:
                self._observers.flush()
            seconds = self._observers.ledger.training_seconds if self._observers else 0.0
            progress = replace(self.progress, loss_scale=self._run.engine.loss_scale, training_seconds=seconds)
            self._report_saves(self._checkpoints.begin(progress, self._validation_loss, on_request))
            if last:
                self._report_saves(self._checkpoints.finish())

    def _end(self, stopping: bool) -> None:
        is_sound = self.progress.skipped_in_a_row == 0 and math.isfinite(self._validation_loss or 0.0)
        self._checkpoints.close(prune=is_sound)
        self._requests.ignore_further()
        self._count_time(self._watch.lap()[1])
        step, saved = self.progress.step, self._checkpoints.last_saved
        if saved != step and step != self._first_step:
            raise CheckpointError(
                f"The run ended after step {step}, but that state could not be saved in {self._run.store.folder}: "
                f"{self._checkpoints.problem}. Make room or mend the cause, then start it again: it goes on from the "
                "newest checkpoint."
            )
        if stopping and not self._is_over:
            signal = self._run.groups.first_value(self._requests.signal)  # it may have come to another rank alone
            who = signal.name if signal else "a callback"
            message = f"stopped early on request ({who}), state saved: start it again to go on"
            if self._observers:
                self._observers.end("stop", step, message)
            raise Preempted(f"Step {step}: {message}.")
        if self._observers:
            before = f": all {step} steps were made before, nothing was trained" if step == self._first_step else ""
            self._observers.end("finish", step, f"training {self._why_over()}{before}")

    def _report(self, step: _Fetched) -> None:
        seconds, parts = self._watch.lap()
        observers = self._observers
        self._count_time(parts)
        self._stragglers.add(parts, step.num_steps)
        ranks = self._compare_ranks(step.flags.compare)
        progress = self.progress
        if observers is None or not self._is_logged(progress.step):
            return
        training_seconds = seconds - parts.get("eval", 0.0) - parts.get("save", 0.0)
        sizes = map(self._run.order.batch_size, range(progress.step - step.num_steps, progress.step))
        num_tokens = sum(sizes) * self._config.data.seq_len
        observers.step(
            StepMetrics(
                step=progress.step,
                tokens=progress.tokens,
                loss=step.loss,
                grad_norm=step.grad_norm,
                lr=step.lr,
                skipped=progress.skipped,
                step_seconds=seconds / step.num_steps,
                tokens_per_second=step.num_targets / training_seconds,
                mfu=mfu(num_tokens / training_seconds, self._flops_per_token, self._peak, self._run.rank.world_size),
                memory_bytes=peak_memory_bytes(self._run.groups.device),
                parts={part: each / step.num_steps for part, each in parts.items()},
                ranks=ranks,
            )
        )

    def _count_time(self, parts: Mapping[str, float]) -> None:
        if self._observers:
            self._observers.ledger.step(parts.get("save", 0.0))

    def _compare_ranks(self, now: bool) -> dict[str, Spread]:
        """Of all ranks the seconds of each part, where they are compared ``now``; a straggler is named."""
        if not now:
            return {}
        self._compare_at = time.monotonic() + self._config.observe.straggler_report_seconds
        spreads, texts = self._stragglers.compare()
        if self._observers:
            for text in texts:
                self._observers.event("straggler", self.progress.step, text)
        return spreads

    def _report_saves(self, results: list[SaveResult]) -> None:
        for result in results:
            if result.path is not None and self._observers:
                self._observers.saved(result.step, result.path, result.seconds)
            elif self._observers:
                cause = self._checkpoints.problem
                text = f"the checkpoint could not be saved ({cause}); training goes on, the one before stays"
                self._observers.event("save failed", result.step, text)

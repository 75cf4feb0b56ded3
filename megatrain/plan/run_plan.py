"""What `megatrain plan` says of a run: memory, time, and what failures cost it, worked out from the config alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatrain.config import RunConfig
from megatrain.config.batch_size import Phase, num_samples_until, phases
from megatrain.plan import rules
from megatrain.plan.arithmetic import micro_batch_seconds, operations
from megatrain.plan.choice import Choice, fastest
from megatrain.plan.cluster import Cluster
from megatrain.plan.fitting import changes_that_fit
from megatrain.plan.flops import flops_per_token, num_parameters, num_trained_parameters
from megatrain.plan.goodput import Failures, best_interval, goodput
from megatrain.plan.hardware import resolve_precision
from megatrain.plan.memory import RankMemory, rank_memory
from megatrain.plan.nearest import with_changes
from megatrain.plan.stage_model import stage_models
from megatrain.plan.this_machine import CPU
from megatrain.plan.time import HOST_BYTES_PER_SECOND, StepTime, pipeline_bubble, step_time
from megatrain.units import format_bytes


@dataclass(frozen=True)
class Interruptions:
    """How often nodes fail, and what saving and restarting cost.

    ``checkpoint_seconds``: that training stands still for a save; None: as long as a copy to CPU memory takes, and,
    where the config does not write in the background, the writing, at ``write_bytes_per_second`` of a node.
    """

    mtbf_hours_per_node: float
    restart_seconds: float
    checkpoint_seconds: float | None = None
    write_bytes_per_second: float = 2e9


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: one entry of ``ranks`` a pipeline stage, whose ranks are all alike."""

    config: RunConfig
    cluster: Cluster
    ranks: tuple[RankMemory, ...]
    time: StepTime
    failures: Failures

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def num_micro_batches(self) -> int:
        """Of a step, on each copy of the model."""
        return rules.num_micro_batches(self.config, self.world_size)

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, without recomputation."""
        config = self.config
        return flops_per_token(
            config.model, config.data.seq_len, config.lora, config.predicted_share, config.target_len
        )

    @property
    def tokens_per_step(self) -> int:
        """Of the whole job; of the largest step, where the batch size has a ramp."""
        return self.config.train.max_batch_size * self.config.data.seq_len

    @property
    def batch_phases(self) -> list[Phase]:
        """The run's steps by their batch size, as far as it is known to reach them."""
        found, steps = phases(self.config.train.global_batch_size, self.config.data.seq_len), self.config.train.steps
        return found if steps is None else [phase for phase in found if phase.first_step < steps]

    @property
    def tokens(self) -> int | None:
        """Of the whole run; None where its data, which says how long it is, is not here."""
        steps = self.config.train.steps
        return None if steps is None else num_samples_until(self.batch_phases, steps) * self.config.data.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job, while it steps."""
        return self.tokens_per_step / self.time.step

    @property
    def mfu(self) -> float:
        """Fraction of the dense bf16 peak of all devices."""
        return self.tokens_per_second * self.flops_per_token / (self.world_size * self.cluster.device.half_flops)

    @cached_property
    def efficiency(self) -> float:
        """Share of its peak at which a device of the slowest stage computes."""
        rates = self.cluster.rates(self.config.train.precision)
        parts = stage_models(self.config, self.world_size)
        seconds, slowest = max((micro_batch_seconds(part, rates), part.stage) for part in parts)
        return operations(parts[slowest]) / seconds / rates.peak

    @property
    def days(self) -> float | None:
        """For all steps, without failures; None where it is not known how many there are."""
        if (steps := self.config.train.steps) is None:
            return None
        ends = [*(phase.first_step for phase in self.batch_phases[1:]), steps]
        seconds = (
            (end - phase.first_step) * self._step_seconds(phase.batch_size)
            for phase, end in zip(self.batch_phases, ends, strict=True)
        )
        return sum(seconds) / 86400

    @property
    def interval_seconds(self) -> float:
        """The best time between two saves."""
        return best_interval(self.failures)

    @property
    def interval_steps(self) -> int:
        """The same in steps, for checkpoint.every_steps."""
        return max(1, round(self.interval_seconds / self.time.step))

    @property
    def goodput(self) -> float:
        """Share of the time that trains the model, saving at that interval."""
        return goodput(self.failures, self.interval_seconds)

    @property
    def configured_goodput(self) -> float:
        """The same, saving as often as the config says."""
        return goodput(self.failures, self.config.checkpoint.every_steps * self.time.step)

    @cached_property
    def fastest(self) -> Choice:
        """The engine and the chunks of a pipeline rank that it would take."""
        return fastest(self.config, self.cluster)

    @property
    def problems(self) -> list[str]:
        """Why the run would not go; none: it fits."""
        device, precision = self.cluster.device, self.config.train.precision
        found = []
        if precision == "bf16" and not device.has_bf16:
            other = "fp32" if device.name == CPU else "fp16"
            found.append(f"{device.name} has no units for bf16, and takes many times as long: train.precision={other}")
        fullest = max(self.ranks, key=lambda rank: rank.peak_bytes)
        if fullest.peak_bytes > device.memory_bytes:
            found.append(self._does_not_fit(fullest))
        return found

    def _step_seconds(self, batch_size: int) -> float:
        config = with_changes(self.config, ("train.global_batch_size", batch_size))
        return step_time(stage_models(config, self.world_size), self.cluster).step

    def _does_not_fit(self, fullest: RankMemory) -> str:
        memory = self.cluster.device.memory_bytes
        changes = changes_that_fit(self.config, self.world_size, self.cluster.gpus_per_node, memory)
        nearest = f"nearest: {changes}" if changes else "no change of up to three keys that was tried would fit"
        return (
            f"a rank of stage {fullest.stage} needs {format_bytes(fullest.peak_bytes)}, and {self.cluster.device.name} "
            f"has {format_bytes(memory)}: weights {format_bytes(fullest.weights_bytes)}, gradients "
            f"{format_bytes(fullest.gradients_bytes)}, optimizer {format_bytes(fullest.optimizer_bytes)}, activations "
            f"{format_bytes(fullest.activations_bytes)}, and what comes and goes; {nearest}"
        )

    def to_json(self) -> dict[str, Any]:
        parallel = self.config.parallel
        return {
            "parameters": num_parameters(self.config.model),
            "trained_parameters": num_trained_parameters(self.config.model, self.config.lora),
            "flops_per_token": self.flops_per_token,
            "world_size": self.world_size,
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.gpus_per_node,
            "device": self.cluster.device.name,
            "device_memory_bytes": int(self.cluster.device.memory_bytes),
            "data": rules.data_degree(self.config, self.world_size),
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "pipeline_chunks": parallel.pipeline_chunks,
            "engine": parallel.engine,
            "fastest": {
                "parallel.engine": self.fastest.engine,
                "parallel.pipeline_chunks": self.fastest.chunks,
                "step_seconds": self.fastest.step_seconds,
            },
            "micro_batches": self.num_micro_batches,
            "problems": self.problems,
            "pipeline_bubble": pipeline_bubble(self.config, self.num_micro_batches),
            "ranks": [rank.to_json() for rank in self.ranks],
            "efficiency": self.efficiency,
            "tokens_per_step": self.tokens_per_step,
            "steps": self.config.train.steps,
            "tokens": self.tokens,
            "step_seconds": self.time.step,
            "seconds": self.time.parts,
            "hidden_data_seconds": self.time.hidden,
            "hidden_tensor_seconds": self.time.hidden_tensor,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "days": self.days,
            "days_with_failures": self.days / self.goodput if self.days is not None and self.goodput else None,
            "mtbf_seconds": self.failures.mtbf,
            "checkpoint_seconds": self.failures.checkpoint,
            "restart_seconds": self.failures.restart,
            "goodput": self.goodput,
            "checkpoint_interval_seconds": self.interval_seconds,
            "checkpoint_every_steps": self.interval_steps,
            "configured_every_steps": self.config.checkpoint.every_steps,
            "configured_goodput": self.configured_goodput,
        }


def make_plan(config: RunConfig, cluster: Cluster, interruptions: Interruptions) -> RunPlan:
    """Plan a run of ``config``, whose vocabulary is known, and its steps as well, if it is to say how long it takes.

    Raises ConfigError where the layout is impossible.
    """
    rules.check(config, cluster.world_size)
    config = resolve_precision(config, cluster.device.has_bf16)
    stages = stage_models(config, cluster.world_size)
    ranks = tuple(rank_memory(part) for part in stages)
    saved_bytes = max(rank.cpu["checkpoint copy"] for rank in ranks)
    still_seconds = saved_bytes / HOST_BYTES_PER_SECOND
    if not config.checkpoint.background:
        still_seconds += saved_bytes * cluster.gpus_per_node / interruptions.write_bytes_per_second
    given = interruptions.checkpoint_seconds
    failures = Failures.of_nodes(
        cluster.nodes,
        interruptions.mtbf_hours_per_node,
        still_seconds if given is None else given,
        interruptions.restart_seconds,
    )
    return RunPlan(config, cluster, ranks, step_time(stages, cluster), failures)

"""The engine: one interface to a model on many ranks, whether DeepSpeed pipelines it or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from megatrain.batch import Batch
from megatrain.config import OptimizerConfig, RunConfig
from megatrain.distributed.fragment import Fragment, ShardSpec, shard_views
from megatrain.distributed.groups import Groups
from megatrain.errors import CheckpointError
from megatrain.parallel.engine import StateReader, StepResult
from megatrain.parallel.old_deepspeed_config import deepspeed_config
from megatrain.parallel.old_deepspeed_engine import PlainDeepSpeedEngine, forget_globals, make_engine
from megatrain.parallel.old_loss_scale import use_power_of_two
from megatrain.parallel.old_mpu import DeepSpeedMPU
from megatrain.parallel.old_state import (
    MasterSlice,
    is_own,
    link_state,
    master_slices,
    sync_master_params,
    torch_optimizer,
)
from megatrain.parallel.old_update_guard import UpdateGuard
from megatrain.parallel.replicas import Replicas, find_differences
from megatrain.parallel.shard import DTYPES, ShardedModel, allocate
from megatrain.parallel.tensor import mark_parameters

WEIGHT = "weight"
ADAM_STATES = ("exp_avg", "exp_avg_sq")

Admit: TypeAlias = Callable[[float, float], bool]
"""Asked on every rank before an update, with this rank's share of the loss sum and the global gradient norm: whether to
make it. The answer must be the same on all ranks; it may communicate. Not asked where the norm is not finite."""


class OldEngine:
    """A model that trains: batches in, figures out; its state as shards that know nothing of the layout."""

    def __init__(self, config: RunConfig, sharded: ShardedModel, groups: Groups) -> None:
        self.groups = groups
        allocate(sharded.chunks, DTYPES[config.train.precision], groups.device)
        mark_parameters(sharded.chunks, sharded.specs, config, groups)
        self._model: Any = SimpleNamespace(
            module=sharded.chunks[0], parameters=sharded.parameters(), specs=sharded.specs
        )
        model = self._model
        num_parameters = sum(spec.local_numel for spec in model.specs.values())
        settings = deepspeed_config(config, groups.topology.world_size, num_parameters)
        optimizer = make_optimizer(config.optimizer, model)
        self._update_guard = UpdateGuard(optimizer)
        self._deepspeed: Any = self._start(optimizer, settings)
        self._is_half = config.train.precision != "fp32"
        if config.train.precision == "fp16":  # at the least scale updates are left out, until the trainer gives up
            self._deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False

    def _start(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        return make_engine(
            PlainDeepSpeedEngine, self._model.module, DeepSpeedMPU(self.groups), optimizer, settings, self.groups
        )

    def train_batch(
        self, micro_batches: Sequence[Batch], num_targets: int, lr: float, admit: Admit | None = None
    ) -> StepResult:
        """One optimizer step on this data rank's share of a global batch with ``num_targets`` target tokens.

        The gradient is that of the mean loss over all targets of the global batch, however they lie on the ranks.
        """
        engine = self._deepspeed
        self._set_lr(lr)
        self._set_num_micro_batches(len(micro_batches))
        skipped_before = engine.skipped_steps
        scale = self._scale(len(micro_batches), num_targets)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        self._ask(admit, lambda: float(loss_sum))
        for batch in self._counted(micro_batches):
            loss = engine(batch.to(self.groups.device))
            engine.backward(loss * scale)
            loss_sum += loss.detach()
            began = time.perf_counter()
            engine.step()  # updates after the last micro-batch, counts before
        skipped = self._update_guard.refused or engine.skipped_steps > skipped_before
        seconds = time.perf_counter() - began
        return StepResult(self._own_share(float(loss_sum)), self._norm(), skipped, seconds)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> float:
        """This rank's share of the sum of the cross-entropy over the scored targets; nothing is learned."""
        engine = self._deepspeed
        engine.eval()
        total = sum(float(engine(batch.to(self.groups.device))) for batch in self._counted(micro_batches))
        engine.train()
        return self._own_share(total)

    def state_fragments(self) -> Iterator[Fragment]:
        """The shards of weights and optimizer state that this rank is to save: over all ranks, each element once.

        The data are views of live memory where they can be: copy them before the next step.
        """
        states = torch_optimizer(self._deepspeed.optimizer).state
        for spec, held in self._slices():
            for start, stop in self._saved_range(spec, held):
                state = states.get(held.buffer, {})
                buffers = {WEIGHT: held.buffer, **{key: state[key] for key in ADAM_STATES if key in state}}
                for shard, where in shard_views(spec, start, stop):
                    for kind, buffer in buffers.items():
                        data = held.of(buffer)[start - held.start : stop - held.start]
                        index = where if isinstance(where, slice) else torch.from_numpy(where).to(data.device)
                        yield Fragment(shard, kind, data[index])

    def check_fragments(self) -> None:
        """Raise CheckpointError where ``state_fragments`` would give out the weights of another parameter than it says.

        Some elements of each are compared with the module's own, which ``sync_params_from_master`` and each update
        made of them.
        """
        own = dict(self._model.module.named_parameters())
        for spec, held in self._slices():
            if not spec.is_copy and not is_own(held, own[spec.name]):
                raise CheckpointError(
                    f"what would be saved as {spec.name} is not that parameter: this version of DeepSpeed, "
                    "under these settings, keeps its state in another order than megatrain reads it in"
                )

    @torch.no_grad()
    def load_fragments(self, source: StateReader, num_updates: int) -> None:
        """Take the weights from ``source``, and the optimizer's state too if it has made ``num_updates`` > 0 (else it
        is as before the first step).

        Not collective: where no rank's ``source`` has failed, ``sync_params_from_master`` completes it.
        """
        optimizer, activity = self._deepspeed.optimizer, self.groups.activity
        states = torch_optimizer(optimizer).state
        num_kinds = 1 + (len(ADAM_STATES) if num_updates else 0)
        activity.begin_transfer(sum(held.length for _, held in self._slices()) * num_kinds * torch.float32.itemsize)
        for spec, held in self._slices():
            kinds = {WEIGHT: held.buffer}
            if num_updates:
                kinds |= _adam_state(states, held.buffer, num_updates)
            else:
                _forget_adam_state(states, held.buffer)
            for shard, where in shard_views(spec, held.start, held.start + held.length):
                for kind, buffer in kinds.items():
                    target = held.of(buffer)
                    in_place = isinstance(where, slice) and target.is_cpu and target.dtype == torch.float32
                    if in_place and target.is_contiguous():
                        source.read_into(target[where], shard, kind)
                    else:
                        index = where if isinstance(where, slice) else torch.from_numpy(where).to(target.device)
                        target[index] = source.read(shard, kind).to(target)
                    activity.transfer(shard.length * torch.float32.itemsize)
            for buffer in kinds.values():
                _clear_padding(spec, held, held.of(buffer))
        if num_updates:
            link_state(optimizer)

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        """After all ranks have loaded: give each the weights it computes with. Collective."""
        sync_master_params(self._deepspeed.optimizer)

    def find_differences(self) -> str | None:
        """Which ranks hold weights that are not those of the others that must hold the same, in words. Collective."""
        return find_differences(self._replicas(), self.groups)

    def _replicas(self) -> Iterator[Replicas]:
        """Along the data axis what ZeRO has not cut up; along the tensor axis what is not split."""
        stage = self._deepspeed.zero_optimization_stage()
        if stage < 3:
            yield Replicas(self.groups.gradient.get_group(), dict(self._model.parameters))
        if stage == 0:
            masters = {f"master weights of {spec.name}": held.of(held.buffer) for spec, held in self._slices()}
            yield Replicas(self.groups.gradient.get_group(), masters)
        whole: dict[str, Tensor] = {}  # on all tensor ranks
        shared: dict[str, Tensor] = {}  # on those with the same key-value head
        for name, parameter in self._model.parameters.items():
            num_replicas = self._model.specs[name].num_replicas
            if num_replicas > 1:
                kind = whole if num_replicas == self.groups.topology.tensor else shared
                kind[name] = getattr(parameter, "ds_tensor", parameter)
        yield from (Replicas(self.groups.tensor, whole), Replicas(self.groups.kv_replica_group, shared))

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The state of fp16's dynamic loss scale; None under another precision."""
        if not self._deepspeed.fp16_enabled():
            return None
        scaler = self._deepspeed.optimizer.loss_scaler
        return {key: float(getattr(scaler, key)) for key in _LOSS_SCALER_STATE}

    def load_loss_scale(self, state: Mapping[str, float]) -> None:
        """Go on with a loss scale that was saved."""
        scaler = self._deepspeed.optimizer.loss_scaler
        for key in state.keys() & set(_LOSS_SCALER_STATE):
            setattr(scaler, key, state[key] if key == "cur_scale" else int(state[key]))

    def _counted(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same; with each that is asked for, another is through."""
        for batch in micro_batches:
            self.groups.activity.batch()
            yield batch

    def close(self) -> None:
        """Free DeepSpeed's hooks and globals, so that another engine can be made in this process."""
        self._deepspeed.destroy()
        forget_globals()

    def _ask(self, admit: Admit | None, loss_sum: Callable[[], float]) -> None:
        """Let ``admit`` decide on the next update; ``loss_sum``: what it is on this rank by then."""
        self._update_guard.open_for(None if admit is None else lambda: admit(self._own_share(loss_sum()), self._norm()))

    def _own_share(self, loss_sum: float) -> float:
        """Tensor ranks compute the same loss: the first of them speaks for all."""
        return loss_sum if self.groups.coordinate.tensor == 0 else 0.0

    def _scale(self, num_micro_batches: int, num_targets: int) -> float:
        """By what a micro-batch's loss sum is multiplied: DeepSpeed averages over micro-batches and data ranks, ours is
        one sum, divided once."""
        per_target = self.groups.topology.data / num_targets
        if self._is_half:
            use_power_of_two(self._deepspeed.optimizer, per_target)
        return num_micro_batches * per_target

    def _norm(self) -> float:
        """The gradient's norm of the step that is being made, or was made last."""
        wrapped = getattr(self._deepspeed.optimizer, "_global_grad_norm", None)
        return float(self._deepspeed.get_global_grad_norm() if wrapped is None else wrapped)

    def _set_lr(self, lr: float) -> None:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def _set_num_micro_batches(self, count: int) -> None:
        """DeepSpeed ends a step where its count of all micro-batches is a multiple of a step's: it begins anew."""
        engine = self._deepspeed
        if count != engine.gradient_accumulation_steps():
            engine.set_train_batch_size(count * engine.train_micro_batch_size_per_gpu() * self.groups.topology.data)
            engine.micro_steps = 0

    def _slices(self) -> Iterator[tuple[ShardSpec, MasterSlice]]:
        parameters = self._model.parameters
        specs = {id(parameter): self._model.specs[name] for name, parameter in parameters.items()}
        for held in master_slices(self._deepspeed.optimizer, list(parameters.values())):
            yield specs[id(held.parameter)], held

    def _saved_range(self, spec: ShardSpec, held: MasterSlice) -> Iterator[tuple[int, int]]:
        """The part of a slice that this rank saves, if any: what several ranks hold alike is shared out among them."""
        replicas, index = spec.num_replicas, spec.replica
        if self._deepspeed.zero_optimization_stage() == 0:
            replicas, index = replicas * self.groups.topology.data, index + replicas * self.groups.coordinate.data
        share = -(-held.length // replicas)
        start, stop = index * share, min((index + 1) * share, held.length)
        if start < stop and not spec.is_copy:
            yield held.start + start, held.start + stop


_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def make_optimizer(config: OptimizerConfig, model: Any) -> torch.optim.Optimizer:
    """AdamW in two groups: matrices decay, vectors (norms and biases) do not. Torch's fused one, the fastest here."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.parameters.items():
        (matrices if len(model.specs[name].global_shape) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def _adam_state(states: Any, buffer: Tensor, num_updates: int) -> dict[str, Tensor]:
    """The state of a buffer as it is after ``num_updates`` steps; made if there was none."""
    if buffer not in states or not states[buffer]:
        states[buffer] = {key: torch.zeros_like(buffer) for key in ADAM_STATES}
    states[buffer]["step"] = torch.tensor(float(num_updates), dtype=torch.float32, device=buffer.device)
    return {key: states[buffer][key] for key in ADAM_STATES}


def _forget_adam_state(states: Any, buffer: Tensor) -> None:
    """As before the first step, where there has been one."""
    for value in states.get(buffer, {}).values():
        value.zero_()


def _clear_padding(spec: ShardSpec, held: MasterSlice, data: Tensor) -> None:
    if spec.padding:
        first = spec.local_numel - spec.padding * (spec.local_numel // spec.local_shape[spec.dim])
        data[max(first - held.start, 0) :] = 0.0

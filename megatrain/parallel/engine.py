"""The engine: one interface to a model on many ranks, whatever shards it and however it is laid out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from megatrain.batch import Batch, InferenceBatch
from megatrain.config import RunConfig
from megatrain.distributed.fragment import AVERAGE, WEIGHT, FlatShard, Fragment, ShardSpec, shard_views
from megatrain.distributed.groups import Groups
from megatrain.errors import CheckpointError
from megatrain.parallel.compile import compiler_errors_told, forget_compiled, is_compiled, run_once, uncompiled
from megatrain.parallel.loss_scale import DynamicLossScale
from megatrain.parallel.pipeline import Field, Pipeline, Record
from megatrain.parallel.replicas import Differences, Replicas, find_differences, mend, tensor_replicas
from megatrain.parallel.shard import DTYPES, ShardedModel
from megatrain.ranges import BACKWARD, FORWARD, OPTIMIZER, name_modules

Admit: TypeAlias = Callable[[float, float], bool]
"""Asked on every rank before an update, with this rank's share of the loss sum and the global gradient norm: whether to
make it. The answer must be the same on all ranks; it may communicate. Not asked where the norm is not finite."""


class MasterSlice(NamedTuple):
    """A part of a parameter whose master weights and optimizer state this rank holds; or of a frozen one, whose
    ``master`` is the weight itself, and which has no state.

    ``name``: of the parameter, as in ``ShardedModel.specs``. ``start``: its first element in the flattened local
    (tensor-parallel) parameter. ``master``: fp32, 1-D. ``state``: the optimizer's state of the same elements by kind
    ("exp_avg", ...), 1-D; empty before the first update. All are views of the memory that training works on.
    """

    name: str
    start: int
    master: Tensor
    state: Mapping[str, Tensor]

    @property
    def kinds(self) -> dict[str, Tensor]:
        """Master weights and state by kind."""
        return {WEIGHT: self.master, **self.state}


class Update(NamedTuple):
    """``grad_norm``: the global gradient norm before clipping; not finite where gradients are not. ``skipped``: weights
    and optimizer state are as they were before. Scalars on the device: to look at them is to wait for it."""

    grad_norm: Tensor
    skipped: Tensor


class Sharding(Protocol):
    """What keeps weights, gradients and optimizer state on the data ranks, and updates them: DeepSpeed or FSDP2.

    A rank's part of the model is its chunks, one for each of its virtual pipeline stages. Gradients are summed over
    micro-batches and data ranks, in fp32.
    """

    is_replicated: bool
    """Whether each data rank holds all master weights and optimizer state (ZeRO 0), which ``slices`` then gives on
    all of them."""
    passes_together: bool
    """Whether a forward pass needs all data ranks, since each holds parts of the weights."""
    dynamic_scale: DynamicLossScale | None
    """fp16's loss scale, which ``step`` updates; None under another precision."""

    def begin_step(self, num_micro_batches: int, num_targets: int) -> float | Tensor:
        """By what the loss sum of each micro-batch is to be multiplied before its backward pass, so that the gradient
        is that of the mean over ``num_targets``."""
        ...

    def forward(self, chunk: int, received: Record | None, batch: Batch | InferenceBatch) -> Record | Tensor:
        """Run the chunk of that index. ``received``: what the stage before gave; None in the first virtual stage. Gives
        activations by name; in the last virtual stage the sum of the cross-entropy, an fp32 scalar, or what an
        InferenceBatch asks."""
        ...

    def backward(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
        """``scalar``: the multiplied loss, or ``pipeline.seeded`` of the chunk's output and its gradient.
        ``is_last_of_chunk``, ``is_last``: of this step, for the chunk, and for the rank."""
        ...

    def step(self, lr: float, approve: Callable[[float], bool] | None) -> Update:
        """Sum the gradients, clip and update. A gradient that is not finite is skipped. ``approve``: asked on every
        rank, with a finite norm, before anything changes. Collective over all ranks."""
        ...

    def gathered(self, layer: nn.Module) -> AbstractContextManager[None]:
        """In this context a decoder layer has the weights that it computes with. Collective over the data ranks."""
        ...

    def evaluation(self) -> AbstractContextManager[None]:
        """In this context ``forward`` learns nothing: no gradients, no dropout."""
        ...

    def slices(self) -> Iterator[MasterSlice]:
        """This rank's master weights and optimizer state, without those of a tied weight's second copy."""
        ...

    def frozen_slices(self) -> Iterator[MasterSlice]:
        """What this rank reads of weights that are not trained, each copy of a tied weight too."""
        ...

    def misplaced(self) -> str | None:
        """The name of a parameter that has not the values of its slices; None where all have. Not collective."""
        ...

    def reset_optimizer_state(self, num_updates: int) -> None:
        """Set the optimizer's state to zero, and its number of updates; for more than 0, make what is missing."""
        ...

    def sync_params_from_master(self) -> None:
        """After master weights were written to: give each rank the weights that it computes with. Collective."""
        ...

    def replicas(self) -> Iterator[Replicas]:
        """What ranks must hold alike."""
        ...

    def close(self) -> None:
        """Leave nothing behind that another engine in this process would meet."""
        ...


class StateReader(Protocol):
    """Where state comes from: a checkpoint, or the computed initial weights."""

    is_computed: bool
    """Whether it needs no file, and ``read_into`` takes a target on a GPU, which computes it."""

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """Write the elements of a shard into ``target``: 1-D, fp32, contiguous, on the CPU."""
        ...


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. ``loss_sum``: this rank's share of the sum over all ranks of the target tokens' cross-entropy
    (nats, before the update). ``grad_norm``: the global one, before clipping. ``skipped``: no update was made. They are
    scalars on the device, which may not have computed them yet. ``optimizer_seconds``: of this process's time, the part
    after the last backward pass."""

    loss_sum: Tensor
    grad_norm: Tensor
    skipped: Tensor
    optimizer_seconds: float


class Engine:
    """A model that trains: batches in, figures out; its state as shards that know nothing of the layout."""

    def __init__(self, config: RunConfig, model: ShardedModel, sharding: Sharding, groups: Groups) -> None:
        self.groups = groups
        self._chunks, self._specs = model.chunks, model.specs
        self.is_compiled = is_compiled(config, groups.device)
        self._sharding = sharding
        for chunk in model.chunks:
            chunk.keeps_encoded = not sharding.passes_together
        self.config = config.model
        self.tokens_at_once = config.train.micro_batch_size * config.data.seq_len
        self.tokens_multiple = config.parallel.tensor if config.parallel.sequence else 1
        self._hidden_size, self._dtype = config.model.hidden_size, DTYPES[config.train.precision]
        self._has_loss = groups.coordinate.pipeline == groups.topology.pipeline - 1
        self._factor: float | Tensor = 1.0  # by which losses are multiplied
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=groups.device)
        self._answer: Tensor | None = None  # to the last InferenceBatch, in the last virtual stage
        self._pipeline: Pipeline[Batch | InferenceBatch] = Pipeline(
            groups.pipeline, len(model.chunks), groups.device, self._fields, self._forward, self._backward
        )

    def train_batch(
        self, micro_batches: Sequence[Batch], num_targets: int, lr: float, admit: Admit | None = None
    ) -> StepResult:
        """One optimizer step on this data rank's share of a global batch with ``num_targets`` target tokens.

        The gradient is that of the mean loss over all targets of the global batch, however they lie on the ranks.
        """
        self._factor = self._sharding.begin_step(len(micro_batches), num_targets)
        self._loss_sum.zero_()
        self._pipeline.train(micro_batches)
        began = time.perf_counter()
        with record_function(OPTIMIZER):
            update = self._sharding.step(lr, admit and (lambda norm: admit(float(self._own_share()), norm)))
        seconds = time.perf_counter() - began
        return StepResult(self._own_share(), update.grad_norm, update.skipped, seconds)

    def evaluate(self, micro_batches: Iterable[Batch]) -> Tensor:
        """This rank's share of the sum of the cross-entropy over the scored targets, a scalar on the device; nothing is
        learned."""
        self._factor = 1.0
        self._loss_sum.zero_()
        with self._sharding.evaluation():
            self._pipeline.evaluate(micro_batches)
        return self._own_share()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """In this context the engine is a `megatrain.model.generate.LanguageModel`, and learns nothing. Collective.

        Each copy of the model answers batches of its own. Where data ranks hold parts of the weights, each pass needs
        all ranks: one that leaves the context takes part in the others' passes until all leave it.
        """
        with self._sharding.evaluation(), uncompiled() if self.is_compiled else contextlib.nullcontext():
            try:
                yield
            finally:
                nothing = torch.zeros((1, self.tokens_multiple), dtype=torch.int64)
                idle = InferenceBatch(nothing, nothing, nothing[:, 0], nothing[:, 0], nothing[:, 0])
                idle = idle._replace(source_tokens_BS=nothing, source_lengths_B=nothing[:, 0] + 1)
                while self._sharding.passes_together and self.groups.all_reduce_sum([0.0])[0]:
                    self._pass(idle)

    def infer(self, batch: InferenceBatch) -> Tensor:
        """See LanguageModel. Only within ``in_use``."""
        if self._sharding.passes_together:
            self.groups.all_reduce_sum([1.0])
        return self._pass(batch)

    def _pass(self, batch: InferenceBatch) -> Tensor:
        """The answer to a batch, which the last pipeline stage has, on all ranks of a copy of the model."""
        self._pipeline.evaluate([batch])
        answer, group = self._answer, self.groups.pipeline
        if self.groups.topology.pipeline > 1:
            if answer is None:
                num_asked = len(batch.rows_N)
                shape = (num_asked, self.config.known_vocab_size) if batch.targets_N is None else (2, num_asked)
                answer = torch.empty(shape, device=self.groups.device)
            dist.broadcast(answer, dist.get_global_rank(group, self.groups.topology.pipeline - 1), group=group)
        assert answer is not None
        self._answer = None
        return answer

    def compile(self, batch: Batch) -> None:
        """Where ``is_compiled``, compile what micro-batches like this one need, before the first step. Collective.

        Raises ConfigError where the compiler fails.
        """
        with compiler_errors_told():
            self.evaluate([batch])
            batch = batch.to(self.groups.device)
            for chunk in self._chunks:
                for names, stream, context in chunk.layer_inputs(batch):
                    # What differs between layers becomes a variable of their graph at the second.
                    for layer in [chunk.get_submodule(name) for name in names[:2]]:
                        with self._sharding.gathered(layer):
                            run_once(layer, self._field(batch, stream), context)

    def name_modules(self) -> list[str]:
        """Let a profiler's trace name the modules: see `megatrain.ranges.name_modules`."""
        return name_modules(self._chunks, is_compiled=self.is_compiled)

    def state_fragments(self) -> Iterator[Fragment]:
        """The shards of weights and optimizer state that this rank is to save: over all ranks, each element once.

        The data are views of live memory where they can be: copy them before the next step.
        """
        for held in self._sharding.slices():
            spec = self._specs[held.name]
            first, last = self._saved_range(spec, len(held.master))
            for shard, where in shard_views(spec, held.start + first, held.start + last) if first < last else ():
                for kind, buffer in held.kinds.items():
                    data = buffer[first:last]
                    index = where if isinstance(where, slice) else torch.from_numpy(where).to(data.device)
                    yield Fragment(shard, kind, data[index])

    def check_fragments(self) -> None:
        """Raise CheckpointError where ``state_fragments`` would give out the weights of another parameter than it says.

        Some elements of each are compared with the module's own, which ``sync_params_from_master`` and each update
        made of them.
        """
        if (name := self._sharding.misplaced()) is not None:
            raise CheckpointError(
                f"what would be saved as {name} is not that parameter: this version of DeepSpeed, "
                "under these settings, keeps its state in another order than megatrain reads it in"
            )

    @torch.no_grad()
    def load_fragments(self, source: StateReader, num_updates: int, *, has_average: bool = True) -> None:
        """Take the weights from ``source``, and the optimizer's state too if it has made ``num_updates`` > 0 (else it
        is as before the first step). Where it ``has_average`` not, an average of the weights begins with them.

        Not collective: where no rank's ``source`` has failed, ``sync_params_from_master`` completes it.
        """
        self._sharding.reset_optimizer_state(num_updates)
        self._read(
            source,
            [(held, held.kinds if num_updates else {WEIGHT: held.master}) for held in self._sharding.slices()],
            {} if has_average else {AVERAGE: WEIGHT},
        )

    @torch.no_grad()
    def load_frozen(self, source: StateReader) -> None:
        """Take the weights that are not trained from ``source``. As ``load_fragments``, which is to follow."""
        self._read(source, [(held, {WEIGHT: held.master}) for held in self._sharding.frozen_slices()])

    def _read(
        self,
        source: StateReader,
        slices: Sequence[tuple[MasterSlice, Mapping[str, Tensor]]],
        stand_ins: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``stand_ins``: by a kind of state, the one that is read in its place."""
        activity = self.groups.activity
        activity.begin_transfer(sum(x.numel() for _, kinds in slices for x in kinds.values()) * torch.float32.itemsize)
        for held, kinds in slices:
            spec = self._specs[held.name]
            for shard, where in shard_views(spec, held.start, held.start + len(held.master)):
                for own_kind, target in kinds.items():
                    kind = stand_ins.get(own_kind, own_kind)
                    is_within_reach = target.is_cpu or source.is_computed
                    in_place = isinstance(where, slice) and target.dtype == torch.float32 and target.is_contiguous()
                    if in_place and is_within_reach:
                        source.read_into(target[where], shard, kind)
                    else:
                        read = torch.empty(shard.length, device=target.device if is_within_reach else "cpu")
                        source.read_into(read, shard, kind)
                        index = where if isinstance(where, slice) else torch.from_numpy(where).to(target.device)
                        target[index] = read.to(target)
                    activity.transfer(shard.length * torch.float32.itemsize)
            for target in kinds.values():
                _clear_padding(spec, held.start, target)

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        """After all ranks have loaded: give each the weights it computes with. Collective."""
        self._sharding.sync_params_from_master()

    def find_differences(self) -> Differences | None:
        """Which ranks hold weights that are not those of the others that must hold the same. Collective."""
        return find_differences(self._sharding.replicas(), self.groups)

    def mend_differences(self) -> None:
        """Give tensor ranks that must hold the same weights and optimizer state those that most of them hold.
        Collective."""
        mend(self._replicated_state(), self.groups)
        self._sharding.sync_params_from_master()

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """The state of fp16's dynamic loss scale; None under another precision."""
        scale = self._sharding.dynamic_scale
        return None if scale is None else scale.state()

    def load_loss_scale(self, state: Mapping[str, float]) -> None:
        """Go on with a loss scale that was saved."""
        if self._sharding.dynamic_scale is not None:
            self._sharding.dynamic_scale.load(state)

    def close(self) -> None:
        """Let another engine be made in this process."""
        self._sharding.close()
        if self.is_compiled:
            forget_compiled()

    def _forward(self, chunk: int, record: Record | None, batch: Batch | InferenceBatch) -> Record | Tensor:
        """A chunk's forward pass for the pipeline; from the last virtual stage the loss that its backward pass begins
        with."""
        self.groups.activity.batch()
        with record_function(FORWARD):
            output = self._sharding.forward(chunk, record, batch.to(self.groups.device))
        if not isinstance(output, Tensor):
            return output
        if isinstance(batch, InferenceBatch):
            self._answer = output.contiguous()  # as a broadcast needs it
            return output
        self._loss_sum += output.detach()
        return output * self._factor

    def _backward(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
        with record_function(BACKWARD):
            self._sharding.backward(chunk, scalar, is_last_of_chunk=is_last_of_chunk, is_last=is_last)

    def _fields(
        self, batch: Batch | InferenceBatch, chunk: int, kind: Literal["forward", "backward"]
    ) -> dict[str, Field]:
        """What passes between stages. Document ids, positions and sample ids each rank reads from the batch."""
        model = self._chunks[chunk]
        names = model.takes(batch) if kind == "forward" else model.gives(batch)
        return {name: self._field(batch, name) for name in names}

    def _field(self, batch: Batch | InferenceBatch, name: str) -> Field:
        """A stream's: of the tokens that an encoder reads ("source"), or of the others."""
        tokens = batch.source_tokens_BS if name == "source" else batch.tokens_BT
        assert tokens is not None
        num_sequences, num_tokens = tokens.shape
        return Field((num_sequences, num_tokens // self.tokens_multiple, self._hidden_size), self._dtype)

    def _replicated_state(self) -> Iterator[Replicas]:
        """Master weights and optimizer state that tensor ranks hold alike."""
        held = {each.name: each.kinds for each in self._sharding.slices()}
        for group, names in tensor_replicas(self._specs, self.groups):
            kinds = ((f"{kind} of {name}", x) for name in names if name in held for kind, x in held[name].items())
            yield Replicas(group, dict(kinds))

    def _own_share(self) -> Tensor:
        """Of the loss sum, which the last pipeline stage has. Tensor ranks compute the same: the first of them
        counts."""
        is_counted = self._has_loss and self.groups.coordinate.tensor == 0
        return self._loss_sum.clone() if is_counted else torch.zeros_like(self._loss_sum)

    def _saved_range(self, spec: ShardSpec, length: int) -> tuple[int, int]:
        """The part of a slice that this rank saves: what several ranks hold alike is shared out among them."""
        number, index = spec.num_replicas, spec.replica
        if self._sharding.is_replicated:
            gradient = self.groups.gradient
            number, index = number * gradient.size(), index + number * gradient.get_local_rank()
        share = -(-length // number)
        return index * share, min((index + 1) * share, length)


def _clear_padding(spec: ShardSpec, start: int, data: Tensor) -> None:
    if spec.padding:
        first = spec.local_numel - spec.padding * (spec.local_numel // spec.local_shape[spec.dim])
        data[max(first - start, 0) :] = 0.0

"""Pipeline parallelism: plays the schedule of a rank, its passes and its messages.

The schedules are those of `megatrain.plan.pipeline_schedule`. How a chunk of the model computes, and what shards it, is
the caller's: two functions. A model without a pipeline is one chunk on one rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatrain.plan.pipeline_schedule import Action, Exchange, Pass, evaluation_schedule, source, training_schedule
from megatrain.ranges import MESSAGES

MicroBatch = TypeVar("MicroBatch")

Record: TypeAlias = Mapping[str, Tensor]
"""What passes from stage to stage, by name. All pipeline ranks have the micro-batch itself: no need to send of it."""

SENDS_IN_FLIGHT = 2
"""Of so many exchanges what was sent takes memory, until it has been waited for."""


class Field(NamedTuple):
    """A tensor of a record. A gradient comes back for those of floating point."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Forward: TypeAlias = Callable[[int, Record | None, MicroBatch], Record | Tensor]
"""Called with a chunk's index, the record of the stage before (None in the first virtual stage) and the micro-batch:
the record for the next stage; in the last virtual stage the loss to begin the backward pass with, a scalar."""


Fields: TypeAlias = Callable[[MicroBatch, int, Literal["forward", "backward"]], Mapping[str, Field]]
"""Of a micro-batch's record that the chunk of an index takes ("forward"), or that it gives, whose gradients come back
("backward")."""


class Backward(Protocol):
    """Run the backward pass from ``scalar``. ``is_last_of_chunk``, ``is_last``: of this step, for the chunk and for the
    rank."""

    def __call__(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None: ...


class Pipeline(Generic[MicroBatch]):
    """This rank's place in a pipeline: ``num_chunks`` chunks of the model, in turn with those of the other ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_chunks: int,
        device: torch.device,
        fields: Fields[MicroBatch],
        forward: Forward[MicroBatch],
        backward: Backward,
    ) -> None:
        """Collective over ``group``, the pipeline's ranks in order. ``fields``: of records that come from another."""
        self._num_ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._num_chunks = num_chunks
        self._fields, self._forward, self._backward = fields, forward, backward
        self._messages = _Messages(group, device, num_chunks)
        # A schedule is made for all ranks at once; with a growing batch size there is another one every few steps.
        self._actions = lru_cache(maxsize=8)(self._make_actions)

    def train(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forward and backward passes of all micro-batches, of which there may be fewer than ranks."""
        self._play(self._actions(training_schedule, len(micro_batches)), micro_batches)
        self._messages.finish()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Forward passes of all micro-batches. No more of them than there are ranks are asked for ahead."""
        remaining = iter(micro_batches)
        while few := list(islice(remaining, self._num_ranks)):
            self._play(self._actions(evaluation_schedule, len(few)), few)
        self._messages.finish()

    def _make_actions(
        self, schedule: Callable[[int, int, int], list[list[Action]]], num_micro_batches: int
    ) -> list[Action]:
        return schedule(self._num_ranks, self._num_chunks, num_micro_batches)[self._rank]

    def _play(self, actions: Sequence[Action], micro_batches: Sequence[MicroBatch]) -> None:
        begun: dict[Pass, _Begun] = {}
        remaining = [len(micro_batches)] * self._num_chunks
        for action in actions:
            if isinstance(action, Exchange):
                with record_function(MESSAGES):
                    self._messages.exchange(action, lambda message: self._fields_of(message, micro_batches))
            elif action.kind == "forward":
                self._run_forward(action, micro_batches[action.micro_batch], begun)
            else:
                remaining[action.stage // self._num_ranks] -= 1
                self._run_backward(action, begun.pop(action._replace(kind="forward")), remaining)

    def _fields_of(self, message: Pass, micro_batches: Sequence[MicroBatch]) -> Mapping[str, Field]:
        """Of the record of a pass on another rank, which is the input or the output of the stage beside it here."""
        stage = message.stage + (1 if message.kind == "forward" else -1)
        return self._fields(micro_batches[message.micro_batch], stage // self._num_ranks, message.kind)

    def _run_forward(self, each: Pass, micro_batch: MicroBatch, begun: dict[Pass, _Begun]) -> None:
        """``begun`` gets what its backward pass begins with, if there is to be one."""
        before, inputs = source(each, self._num_ranks * self._num_chunks), None
        if before is not None:
            inputs = self._messages.take(before)
            if torch.is_grad_enabled():
                inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
        result = self._forward(each.stage // self._num_ranks, inputs, micro_batch)
        if not isinstance(result, Tensor):
            self._messages.put(each, {name: x.detach() for name, x in result.items()})
        if not torch.is_grad_enabled():
            return
        if isinstance(result, Tensor):
            begun[each] = _Begun(inputs, result, [], [])
        else:
            gradients: list[Tensor] = []
            names = [name for name, x in result.items() if x.is_floating_point()]
            begun[each] = _Begun(inputs, seeded([result[name] for name in names], gradients), names, gradients)

    def _run_backward(self, each: Pass, begun: _Begun, remaining: Sequence[int]) -> None:
        chunk = each.stage // self._num_ranks
        if begun.names:
            after = self._messages.take(each._replace(stage=each.stage + 1))
            begun.gradients.extend(after[name] for name in begun.names)
        self._backward(chunk, begun.scalar, is_last_of_chunk=not remaining[chunk], is_last=not any(remaining))
        if begun.inputs is not None:
            floating = {name: x for name, x in begun.inputs.items() if x.is_floating_point()}
            gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in floating.items()}
            self._messages.put(each, gradients)


class _Begun(NamedTuple):
    """A forward pass that waits for its backward pass. Of the outputs it has their place in the graph, no values."""

    inputs: Record | None
    scalar: Tensor
    names: list[str]
    gradients: list[Tensor]


def seeded(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose backward pass gives each of ``outputs`` its gradient; those are looked at only then.

    What takes a loss (DeepSpeed's engine) so takes the stages that have none. What comes in itself, such as a factor,
    is ignored: the last stage's loss had it.
    """
    scalar: Tensor = _Seed.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
    return scalar


class _Seed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)


class _Messages:
    """Results of passes on their way between the ranks of a pipeline."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, num_chunks: int) -> None:
        self._group, self._device = group, device
        self._num_ranks = dist.get_world_size(group)
        self._to_send: dict[Pass, Record] = {}
        self._received: dict[Pass, tuple[Record, list[dist.Work]]] = {}
        self._sent: deque[tuple[list[dist.Work], list[Tensor]]] = deque()
        self._connect(num_chunks)

    def put(self, message: Pass, record: Record) -> None:
        """Keep a result until its exchange."""
        self._to_send[message] = record

    def take(self, message: Pass) -> Record:
        """The result of a pass on another rank, once it is there."""
        record, works = self._received.pop(message)
        with record_function(MESSAGES):
            for work in works:
                work.wait()
        return record

    def exchange(self, exchange: Exchange, fields_of: Callable[[Pass], Mapping[str, Field]]) -> None:
        """Start sending and receiving. ``fields_of``: of a record that is to be received; there may be none."""
        operations: list[dist.P2POp] = []
        kept: list[Tensor] = []
        for message in exchange.sends:
            record = self._to_send.pop(message)
            kept += [record[name].contiguous() for name in sorted(record)]
            to = message.stage + (1 if message.kind == "forward" else -1)
            operations += [self._operation(dist.isend, x, to) for x in kept[len(operations) :]]
        num_sends = len(operations)
        records: list[tuple[Pass, Record, int]] = []
        for message in exchange.receives:
            fields = fields_of(message)
            record = {
                name: torch.empty(field.shape, dtype=field.dtype, device=self._device)
                for name, field in sorted(fields.items())
                if message.kind == "forward" or field.dtype.is_floating_point
            }
            records.append((message, record, len(operations)))
            operations += [self._operation(dist.irecv, x, message.stage) for x in record.values()]
        works = dist.batch_isend_irecv(operations) if operations else []
        one_each = len(works) == len(operations)  # else the backend gives one for the whole batch
        for message, record, first in records:
            self._received[message] = record, works[first : first + len(record)] if one_each else works
        if kept:
            self._sent.append((works[:num_sends] if one_each else works, kept))
        self._release(SENDS_IN_FLIGHT)

    def finish(self) -> None:
        """Wait for all that was sent."""
        if self._sent:
            with record_function(MESSAGES):
                self._release(0)

    def _release(self, num_in_flight: int) -> None:
        while len(self._sent) > num_in_flight:
            works, _ = self._sent.popleft()
            for work in works:
                work.wait()

    def _operation(self, kind: Callable[..., Any], x: Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, x, group=self._group, group_peer=stage % self._num_ranks)

    def _connect(self, num_chunks: int) -> None:
        """One message each way between neighbors: NCCL connects two ranks at their first, which both must begin."""
        rank, last = dist.get_rank(self._group), self._num_ranks * num_chunks - 1
        chunks = [chunk * self._num_ranks + rank for chunk in range(num_chunks)]
        ahead = {stage + 1 for stage in chunks if stage < last}
        behind = {stage - 1 for stage in chunks if stage > 0}
        operations = []
        for peer in {stage % self._num_ranks for stage in ahead | behind} - {rank}:
            operations.append(self._operation(dist.isend, torch.zeros(1, device=self._device), peer))
            operations.append(self._operation(dist.irecv, torch.zeros(1, device=self._device), peer))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

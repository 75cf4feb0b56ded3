"""Sharding by DeepSpeed's ZeRO, through ``deepspeed.initialize`` and its public config.

Gradients add up in fp32 until ``step`` (unmanaged accumulation), whatever the model computes in. Stage 0 in half
precision is DeepSpeed's stage 1 among one rank, with whole fp32 gradients that are summed here over the data ranks: its
own stage 0 adds gradients up in the type of the weights.

What is used of DeepSpeed beside what it documents, and the test that fails where it has changed:

| name | reason | test |
|---|---|---|
| ``optimizer._global_grad_norm`` | the norm before the update: ``engine.get_global_grad_norm()`` has it after | tests/faults/test_spikes.py |
| ``optimizer.override_loss_scale`` | a power of two in the backward pass, the rest of the factor in fp32 | tests/parity/test_loss_scale.py |
| ``optimizer.get_grads_for_reduction`` | bf16's fp32 sums of stage 0 and 1, for that rest and for stage 0's sum | tests/parity/test_zero.py |
| ``optimizer.get_gradient_for_reduction`` | the same of one parameter, in fp16 at stage 0 | tests/parity/test_loss_scale.py |
| ``optimizer.update_lp_params`` | gives weights out after masters were written to, stages 1 and 2 | tests/parity/test_checkpoints.py |
| ``optimizer.fp32_partitioned_groups_flat`` | stage 3's masters: ``safe_get_local_fp32_param`` copies offloaded ones | tests/parity/test_checkpoints.py |
| ``parameter.ds_tensor`` | the part of a weight that this rank holds at stage 3 | tests/parity/test_checkpoints.py |
| ``ops.__compatible_ops__`` | empty: else each rank calls compilers to see what it could build | tests/unit/parallel/test_deepspeed_start.py |
| ``compiler.compile`` | away while Muon is imported, which would load torch's compiler for it | tests/unit/parallel/test_deepspeed_start.py |
| ``accelerator.is_fp16_supported`` | torch computes fp16 on any CPU, only slowly | tests/parity/test_loss_scale.py |
"""  # noqa: E501 - a table

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import itertools
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatrain.batch import Batch, InferenceBatch
from megatrain.config import RunConfig
from megatrain.distributed.device import has_gpu
from megatrain.distributed.groups import Groups
from megatrain.errors import ConfigError
from megatrain.parallel.deepspeed_config import deepspeed_config, offload_settings
from megatrain.parallel.engine import MasterSlice, Update
from megatrain.parallel.loss_scale import DynamicLossScale, backward_factor
from megatrain.parallel.optimizer import ParameterScale, Part, make_optimizer, reset_state, state_kinds
from megatrain.parallel.pipeline import Record, seeded
from megatrain.parallel.replicas import Replicas, tensor_replicas
from megatrain.parallel.shard import DTYPES, ShardedModel, allocate, allocate_own
from megatrain.parallel.tensor import PartialGradients, partial_gradients

# Its autotuner, which is not used, loads MLflow and pandas wherever they are installed: seconds of every start.
sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
import deepspeed  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

if not sys.modules["mlflow"]:
    del sys.modules["mlflow"]

OLDEST = "0.19.8"
_TORCH_LINEAR = functional.linear
# In place of a chunk's index, for weights themselves: those that other stages hold copies of, and those of which tensor
# ranks compute parts of gradients.
_SHARED, _PARTIAL = -1, -2


def start_deepspeed(timeout_seconds: float) -> None:
    """Let DeepSpeed use the default process group; where there is none yet, join it as the environment says. Raises
    ConfigError where it is too old.

    DeepSpeed's all-reduce through shared memory is left out: compiling it takes over a minute on first use, and a
    build that is killed leaves a lock on which every later start waits for ever. It is the only user of the list of
    what could be compiled here, for which DeepSpeed would call compilers and package managers on every rank.
    """
    if _numbers(deepspeed.__version__) < _numbers(OLDEST):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} is installed, and megatrain needs {OLDEST} or later: older ones train "
            f"with wrong gradients, or stop. Install it, as with: pip install 'deepspeed>={OLDEST}'"
        )
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has given new ones; nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.ops.__compatible_ops__ = {}
    # Each optimizer is asked whether it is Muon. None is here; but Muon's import would load the whole of torch's
    # compiler, for a second on every rank, only to say which of its functions to compile.
    compile_later, compiler.compile = compiler.compile, lambda: lambda function: function
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    compiler.compile = compile_later
    if not has_gpu():
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(
        dist_backend="nccl" if has_gpu() else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def forget_globals() -> None:
    """Let another engine in this process compute what it would in a fresh one: ZeRO 3 puts its own linear for torch's,
    which rounds otherwise in bf16, and leaves it there."""
    functional.linear = _TORCH_LINEAR


class DeepSpeedSharding:
    """See megatrain.parallel.engine.Sharding, of this and of each method."""

    def __init__(self, config: RunConfig, model: ShardedModel, groups: Groups) -> None:
        precision, self._stage = config.train.precision, config.parallel.zero_stage
        self._groups, self._model, self._clip = groups, model, config.train.gradient_clipping
        self.is_replicated = self._stage == 0
        self.passes_together = self._stage == 3 and groups.gradient.size() > 1
        self._is_half = precision != "fp32"
        self._has_fp32_sums = precision == "bf16" and self._stage < 2 and config.parallel.offload == "none"
        self._sums_whole = self.is_replicated and self._is_half  # here, not DeepSpeed
        self.dynamic_scale = DynamicLossScale.of(config.train, torch.device("cpu"))  # DeepSpeed decides there
        self._rest = 1.0  # by what fp32 gradients are still to be multiplied
        self._mpu = _mpu(groups, groups.self_group if self._sums_whole else groups.gradient.get_group())
        _allocate(model, config, groups, self._mpu)
        for name, parameter in model.parameters().items():
            # DeepSpeed counts a parameter on the first tensor rank alone, unless it is marked.
            spec: Any = model.specs[name]
            marked: Any = parameter
            marked.model_parallel = spec.num_replicas < groups.topology.tensor and spec.replica == 0
        self._parameters = model.updated()
        partial = self._find_partial(config)
        sees_whole = self.is_replicated or self._has_fp32_sums  # the sums, before DeepSpeed cuts them
        self._partial = partial if sees_whole else []
        self._kept = [] if sees_whole else [self._keep(group, names) for group, names in partial]
        self._shared = model.shared_updated()
        self._copied_sums: dict[str, Tensor] = {}  # of the gradients of copies, which are out of the optimizer
        for copy in (each for each in self._shared if each.is_copy):
            self._copied_sums[copy.name] = torch.zeros_like(copy.weight, dtype=torch.float32)
            hook = functools.partial(_move_gradient, self._copied_sums[copy.name])
            copy.weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._scale: ParameterScale | None = None
        if config.optimizer.scale_parameter:
            updated = {name: model.specs[name] for name in self._parameters}
            self._scale = ParameterScale(updated, groups, is_replicated=self.is_replicated)
        self._optimizer = make_optimizer(config, self._parameters, model.specs, self._scale)
        self._state_kinds = state_kinds(config.optimizer)
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._flattened = [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups]
        zero: Any = config.deepspeed.get("zero_optimization", {})
        self._alignment = 1
        if zero.get("parameter_alignment") and not self._has_fp32_sums:
            self._alignment = 16 // DTYPES[precision].itemsize
        self._approve: Callable[[float], bool] | None = None
        self._is_approved: bool | None = None
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._optimizer.register_step_pre_hook(self._before_update)
        self._optimizer.register_step_post_hook(self._after_update)
        sizes = {name: model.specs[name].local_numel for name in (*self._parameters, *model.frozen())}
        num_updated = sum(sizes[name] for name in self._parameters)
        settings = deepspeed_config(config, self._mpu.get_data_parallel_world_size(), sum(sizes.values()), num_updated)
        with _as_no_garbage(), contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what memory it finds
            self._deepspeed: Any = deepspeed.initialize(
                model=_Chunks(model, self._apart()),
                optimizer=self._optimizer,
                mpu=self._mpu,
                config=settings,
                dist_init_required=False,
            )[0]
        # Found here: within an update DeepSpeed shows one of its groups alone.
        self._tensor_replicas = self._find_tensor_replicas()

    def begin_step(self, num_micro_batches: int, num_targets: int) -> float | Tensor:
        for kept in self._kept:
            kept.begin_step()
        # DeepSpeed averages over its data ranks; ours is one sum, divided once.
        per_target: float = self._mpu.get_data_parallel_world_size() / num_targets
        if not self._is_half:
            return per_target
        factor = float(backward_factor(per_target, self.dynamic_scale))
        if self._has_fp32_sums:
            self._rest = per_target / factor
            return factor
        # DeepSpeed multiplies the loss by it as it begins the backward pass, and divides its fp32 gradients.
        self._deepspeed.optimizer.override_loss_scale(factor / per_target)
        return per_target

    def forward(self, chunk: int, received: Record | None, batch: Batch | InferenceBatch) -> Record | Tensor:
        output: Record | Tensor = self._deepspeed(chunk, batch, received)
        return output

    def backward(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
        self._deepspeed.backward(scalar, scale_wrt_gas=False)

    def step(self, lr: float, approve: Callable[[float], bool] | None) -> Update:
        """It waits for the device: DeepSpeed decides on the host whether to update."""
        engine, optimizer = self._deepspeed, self._deepspeed.optimizer
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._send_shared_gradients()
        self._add_partial_gradients()
        if self._has_fp32_sums:
            torch._foreach_mul_(optimizer.get_grads_for_reduction()[0], self._rest)
        self._sum_partial_gradients()
        for gradient in self._whole_gradients() if self._sums_whole else ():
            dist.all_reduce(gradient, group=self._groups.gradient.get_group())
        if self._scale is not None:
            self._scale.measure(Part(place.name, place.buffer, place.cut(place.buffer)) for place in self._places())
        self._approve, self._is_approved = approve, None
        engine.step()
        self._copy_shared_weights()
        norm = self._norm if optimizer is self._optimizer else float(engine.get_global_grad_norm())
        is_skipped = not (math.isfinite(norm) and engine.was_step_applied())
        if self.dynamic_scale is not None:
            self.dynamic_scale.update(overflow=torch.tensor(is_skipped))
        skipped = is_skipped or self._is_approved is False
        device = self._groups.device
        return Update(torch.full((), norm, device=device, dtype=torch.float64), torch.full((), skipped, device=device))

    def gathered(self, layer: nn.Module) -> contextlib.AbstractContextManager[None]:
        """See Sharding. Stage 3 gathers by itself."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        self._deepspeed.eval()
        with torch.no_grad():
            yield
        self._deepspeed.train()

    def slices(self) -> Iterator[MasterSlice]:
        for place in self._places():
            yield place.held(self._optimizer.state.get(place.buffer, {}))

    def _places(self) -> Iterator[_Place]:
        """By the order in which DeepSpeed flattens parameters and cuts them; ``misplaced`` checks it."""
        rank, num_ranks = self._mpu.get_data_parallel_rank(), self._mpu.get_data_parallel_world_size()
        sizes = {name: self._model.specs[name].local_numel for name in self._parameters}
        if self._deepspeed.optimizer is self._optimizer:  # fp32 without ZeRO: the parameters themselves
            for name, parameter in self._parameters.items():
                yield _Place(name, 0, parameter, 0, parameter.numel())
        elif self._stage == 3:  # each parameter is cut by itself; the cuts are in buffers that no cut crosses
            buffers, offset = iter(self._buffers()), 0
            buffer = next(buffers)
            for name in itertools.chain(*self._flattened):
                share = -(-sizes[name] // num_ranks)
                if offset == buffer.numel():
                    buffer, offset = next(buffers), 0
                if (length := min(share, sizes[name] - rank * share)) > 0:
                    yield _Place(name, rank * share, buffer, offset, length)
                offset += share
        else:  # the parameters of a group lie one after another, and are cut together
            for names, buffer in zip(self._flattened, self._buffers(), strict=True):
                place = -rank * buffer.numel()  # of the parameter's first element in this rank's cut
                for name in names:
                    low, high = max(place, 0), min(place + sizes[name], buffer.numel())
                    if low < high:
                        yield _Place(name, low - place, buffer, low, high - low)
                    place += -(-sizes[name] // self._alignment) * self._alignment

    def frozen_slices(self) -> Iterator[MasterSlice]:
        """Below stage 3 each data rank reads a share too, and sends it to the others, which hold whole weights."""
        rank, num_ranks = self._groups.gradient.get_local_rank(), self._groups.gradient.size()
        for name, parameter in self._model.frozen().items():
            size, partition = self._model.specs[name].local_numel, getattr(parameter, "ds_tensor", None)
            share = -(-size // num_ranks)
            start = rank * share
            if (length := min(share, size - start)) > 0:
                held, offset = (parameter, start) if partition is None else (partition, 0)
                yield _Place(name, start, held, offset, length).held({})

    def misplaced(self) -> str | None:
        own = self._model.parameters()
        return next((held.name for held in self.slices() if not _has_values(own[held.name], held)), None)

    @torch.no_grad()
    def reset_optimizer_state(self, num_updates: int) -> None:
        for buffer in self._buffers():
            reset_state(self._optimizer.state[buffer], buffer, self._state_kinds, num_updates)

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        if self._stage == 3:
            for held in self.slices():
                partition: Tensor = self._parameters[held.name].ds_tensor  # type: ignore[attr-defined]
                partition.view(-1)[: len(held.master)].copy_(held.master)
        elif self._deepspeed.optimizer is not self._optimizer:
            self._deepspeed.optimizer.update_lp_params()
        self._send_frozen_shares()
        self._copy_shared_weights()

    def replicas(self) -> Iterator[Replicas]:
        """Along the data axis what ZeRO has not cut up; along the tensor axis what is not split."""
        held: dict[str, Tensor] = {**self._parameters, **self._model.frozen()}
        if self._stage < 3:
            yield Replicas(self._groups.gradient.get_group(), held)
        if self.is_replicated:
            masters = {f"master weights of {held.name}": held.master for held in self.slices()}
            yield Replicas(self._groups.gradient.get_group(), masters)
        for group, names in tensor_replicas(self._model.specs, self._groups):
            yield Replicas(
                group, {name: getattr(held[name], "ds_tensor", held[name]) for name in names}, may_drift=True
            )
        for shared in self._shared:
            yield Replicas(shared.group, {self._model.specs[shared.name].name: shared.weight}, may_drift=True)

    def close(self) -> None:
        self._deepspeed.destroy()
        forget_globals()

    def _whole_gradients(self) -> Iterable[Tensor]:
        """The sums of this rank's micro-batches: where they are fp32, all of a group in one tensor."""
        if self._has_fp32_sums:
            sums: list[Tensor] = self._deepspeed.optimizer.get_grads_for_reduction()[0]
            return sums
        return self._gradients_by_name().values()

    def _gradients_by_name(self) -> dict[str, Tensor]:
        """The same of each parameter, flat; of stage 0, and of stage 1 with fp32 sums."""
        optimizer = self._deepspeed.optimizer
        if self._has_fp32_sums:  # the parameters of a group lie one after another
            found: dict[str, Tensor] = {}
            for names, flat in zip(self._flattened, optimizer.get_grads_for_reduction()[0], strict=True):
                sizes = [self._parameters[name].numel() for name in names]
                found |= zip(names, flat[: sum(sizes)].split(sizes), strict=True)  # padding lies behind
            return found
        if optimizer is self._optimizer:
            return {name: p.grad.view(-1) for name, p in self._parameters.items() if p.grad is not None}
        return {name: optimizer.get_gradient_for_reduction(p).view(-1) for name, p in self._parameters.items()}

    def _find_partial(self, config: RunConfig) -> list[tuple[dist.ProcessGroup, list[str]]]:
        """The parameters of which each tensor rank computes a part of the gradient, to be summed once a step."""
        names = partial_gradients(self._model.chunks, self._model.specs, config)
        partial = [
            (group, [name for name in alike if name in names and name in self._parameters])
            for group, alike in tensor_replicas(self._model.specs, self._groups)
            if dist.get_world_size(group) > 1
        ]
        return [(group, alike) for group, alike in partial if alike]

    def _keep(self, group: dist.ProcessGroup, names: list[str]) -> PartialGradients:
        sizes = {self._parameters[name]: self._model.specs[name].local_numel for name in names}
        return PartialGradients(sizes, group, self._groups.device)

    def _apart(self) -> dict[int, list[nn.Parameter]]:
        """The weights whose gradients do not all come from the chunks' passes."""
        shared = [each.weight for each in self._shared if not each.is_copy]
        return {_SHARED: shared, _PARTIAL: [weight for kept in self._kept for weight in kept.parameters]}

    def _add_partial_gradients(self) -> None:
        """The sums of tensor ranks' parts enter as one more micro-batch's, where DeepSpeed has cut its own sums by now
        and takes norm and clip of its shares."""
        if self._kept:
            self._add_micro_batch(_PARTIAL, [total for kept in self._kept for total in kept.sum()])

    def _add_micro_batch(self, which: int, gradients: Sequence[Tensor]) -> None:
        """To the gradients of the weights of one kind that are apart."""
        with deepspeed.zero.GatheredParameters(self._apart()[which], enabled=self._stage == 3):
            weights = self._deepspeed(which, None, None)
            seeds = [total.view_as(weight).to(weight) for total, weight in zip(gradients, weights, strict=True)]
            self._deepspeed.backward(seeded(weights, seeds), scale_wrt_gas=False)

    def _sum_partial_gradients(self) -> None:
        """In one message for each group, in the type that gradients add up in."""
        whole = self._gradients_by_name() if self._partial else {}
        for group, names in self._partial:
            parts = [whole[name] for name in names]
            total = torch.cat(parts)
            dist.all_reduce(total, group=group)
            torch._foreach_copy_(parts, list(torch.split(total, [len(part) for part in parts])))

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The last moment before an update: its gradient is summed, measured and clipped, and no weight is changed yet.

        DeepSpeed's optimizers call the torch optimizer underneath once for each of their groups. With its gradients
        out of sight that leaves weights and moments as they are.
        """
        if self._is_approved is None:
            norm = self._norm_before_update()
            self._is_approved = math.isfinite(norm) and (self._approve is None or self._approve(norm))
        gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
        if self._is_approved:
            self._share_gradients({id(buffer): gradient for buffer, gradient in gradients})
            return
        self._hidden = gradients
        for parameter, _gradient in gradients:
            parameter.grad = None

    def _share_gradients(self, gradients: dict[int, Tensor]) -> None:
        """Give tensor ranks the first one's gradient of what they hold alike. The data ranks' sums are the same number
        in each of their groups, but not to the last bit: the order in which NCCL adds is its own, and weights would
        drift apart. ``gradients``: by the buffer's id."""
        for group, places in self._tensor_replicas:
            held = [place for place in places if id(place.buffer) in gradients]
            if held:
                parts = [place.cut(gradients[id(place.buffer)]) for place in held]
                shared = torch.cat(parts).to(self._groups.device)
                dist.broadcast(shared, dist.get_process_group_ranks(group)[0], group=group)
                torch._foreach_copy_(parts, list(torch.split(shared, [place.length for place in held])))

    def _find_tensor_replicas(self) -> list[tuple[dist.ProcessGroup, list[_Place]]]:
        """What tensor ranks hold alike."""
        places = {place.name: place for place in self._places()}
        return [
            (group, [places[name] for name in names if name in places])
            for group, names in tensor_replicas(self._model.specs, self._groups)
            if dist.get_world_size(group) > 1
        ]

    def _after_update(self, *_: Any) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []

    def _norm_before_update(self) -> float:
        """The gradient's norm. DeepSpeed has it, and has clipped, but for stage 0 in fp32: there its optimizer is
        torch's own."""
        optimizer = self._deepspeed.optimizer
        if optimizer is not self._optimizer:
            return float(optimizer._global_grad_norm)
        specs, parameters = self._model.specs, self._parameters
        counted = [p.grad for name, p in parameters.items() if specs[name].replica == 0 and p.grad is not None]
        square = torch.zeros((), device=self._groups.device)
        if counted:
            square += torch.nn.utils.get_total_norm(counted) ** 2
        dist.all_reduce(square, group=self._groups.model_parallel_group)
        if self._clip > 0.0:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self._clip, square.sqrt())
        self._norm = float(square.sqrt())
        return self._norm

    def _buffers(self) -> list[Tensor]:
        """The master weights, as the torch optimizer underneath has them: what its state is keyed by."""
        if self._stage == 3:
            return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return [buffer for group in self._optimizer.param_groups for buffer in group["params"]]

    def _send_shared_gradients(self) -> None:
        """The sums of copies' gradients to the stages that update the weights, where they enter as one more
        micro-batch's."""
        totals: list[Tensor] = []
        for shared in self._shared:
            total = self._copied_sums.get(shared.name)
            if total is None:
                total = torch.zeros_like(shared.weight, dtype=torch.float32)
                totals.append(total)
            dist.reduce(total, shared.owner, group=shared.group)
        if totals:
            self._add_micro_batch(_SHARED, totals)
        for total in self._copied_sums.values():
            total.zero_()

    def _send_frozen_shares(self) -> None:
        """Each data rank's to the others, where all hold whole weights."""
        group = self._groups.gradient.get_group()
        for parameter in self._model.frozen().values() if self._stage < 3 else ():
            shares = torch.split(parameter.detach().view(-1), -(-parameter.numel() // dist.get_world_size(group)))
            for rank, share in zip(dist.get_process_group_ranks(group), shares, strict=False):
                dist.broadcast(share, rank, group=group)

    def _copy_shared_weights(self) -> None:
        """Their values to the stages that have copies."""
        for shared in self._shared:
            dist.broadcast(shared.weight.detach(), shared.owner, group=shared.group)


class _Place(NamedTuple):
    """Where this rank's part of a parameter lies: ``length`` elements from ``start`` on of the flattened local
    parameter, from ``offset`` on in ``buffer``."""

    name: str
    start: int
    buffer: Tensor
    offset: int
    length: int

    def cut(self, values: Tensor) -> Tensor:
        """The part of ``values``, which lie as the buffer does."""
        return values.detach().view(-1).narrow(0, self.offset, self.length)

    def held(self, state: Mapping[str, Tensor]) -> MasterSlice:
        """The part, with the optimizer's ``state`` of the buffer."""
        kinds = {kind: self.cut(x) for kind, x in state.items() if kind != "step"}
        return MasterSlice(self.name, self.start, self.cut(self.buffer), kinds)


class _Chunks(nn.Module):
    """What DeepSpeed trains: the chunks, each called by its index; and some weights, as they are."""

    def __init__(self, model: ShardedModel, apart: Mapping[int, Sequence[nn.Parameter]]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(model.chunks)
        self._apart = apart  # no second names for them

    def forward(
        self, chunk: int, batch: Batch | InferenceBatch | None, received: Record | None
    ) -> Record | Tensor | list[Tensor]:
        if chunk < 0:
            return [weight.view_as(weight) for weight in self._apart[chunk]]
        output: Record | Tensor = self.chunks[chunk](batch, received)
        return output


@torch.no_grad()
def _move_gradient(total: Tensor, weight: Tensor) -> None:
    """What a backward pass has added, to the sum of a step."""
    assert weight.grad is not None
    total += weight.grad
    weight.grad = None


def _mpu(groups: Groups, data: dist.ProcessGroup) -> Any:
    """The mesh under the names by which DeepSpeed asks for it. ``data``: the ranks that it shards and sums among."""
    found: dict[str, Any] = {"get_data_parallel_group_ranks": lambda: dist.get_process_group_ranks(data)}
    axes = {
        "data_parallel": data,
        "model_parallel": groups.model_parallel_group,
        "tensor_model_parallel": groups.tensor,
    }
    for axis, group in axes.items():
        found[f"get_{axis}_group"] = functools.partial(_same, group)
        found[f"get_{axis}_rank"] = functools.partial(dist.get_rank, group)
        found[f"get_{axis}_world_size"] = functools.partial(dist.get_world_size, group)
    return SimpleNamespace(**found)


def _same(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return group


def _allocate(model: ShardedModel, config: RunConfig, groups: Groups, mpu: Any) -> None:
    """Memory for every parameter; under ZeRO 3 each module's is cut among the data ranks at once."""
    dtype = DTYPES[config.train.precision]
    if config.parallel.zero_stage < 3:
        allocate(model.chunks, dtype, groups.device)
        return
    given = config.deepspeed.get("zero_optimization", {})  # some of its keys are read here, not by the engine
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **offload_settings(config), **given}  # type: ignore[dict-item]
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    data = groups.gradient.get_group()
    for chunk in model.chunks:
        for module in list(chunk.modules()):
            chunk.tie_weights()  # a tied head takes the embedding's weight, once that is there
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                for inner in module.modules():  # zero.Init takes the parameters of all of them
                    allocate_own(inner, dtype, groups.device)
                deepspeed.zero.Init(
                    module=module, data_parallel_group=data, config_dict_or_path=settings, dtype=dtype, mpu=mpu
                )


def _has_values(parameter: nn.Parameter, held: MasterSlice) -> bool:
    """Whether ``parameter`` has the values of a slice, by some of its elements, in the type that it computes in. It
    waits for the device."""
    partition = getattr(parameter, "ds_tensor", None)  # ZeRO 3: of this rank, as the slice is
    own = parameter.detach().view(-1)[held.start :] if partition is None else partition.detach().view(-1)
    length = len(held.master)
    step = max((length - 1) // 3, 1)
    expected, found = held.master[::step], own[:length:step]
    if expected.shape != found.shape:
        return False
    expected = expected.to(device=found.device, dtype=found.dtype)
    return bool(((expected == found) | (expected.isnan() & found.isnan())).all())


@contextlib.contextmanager
def _as_no_garbage() -> Iterator[None]:
    """What is there by now need not be looked through for garbage: for its reports of memory, most of them never
    shown, DeepSpeed collects it half a dozen times, each a sixth of a second with all that torch has imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

"""Sharding by torch's own FSDP2 (``fully_shard``), through its public methods alone.

Each rank keeps its rows of every parameter as an fp32 master, and their optimizer state; of a frozen one in the type
that it computes in, which is also the type that a layer's weights are gathered in. ZeRO 0 and 1 are the same here:
whole gradients are added up in fp32, and reduce-scattered during the step's last backward pass. Stage 2 does that in
each micro-batch; stage 3 also frees weights after each pass.

FSDP2 sums and does not average: the loss is divided by the global number of targets before its backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatrain.batch import Batch, InferenceBatch
from megatrain.config import RunConfig
from megatrain.distributed.groups import Groups
from megatrain.errors import ConfigError
from megatrain.parallel.engine import MasterSlice, Update
from megatrain.parallel.loss_scale import DynamicLossScale, backward_factor, power_of_two_below
from megatrain.parallel.optimizer import ParameterScale, Part, make_optimizer, reset_state, state_kinds
from megatrain.parallel.pipeline import Record
from megatrain.parallel.replicas import Replicas, tensor_replicas
from megatrain.parallel.shard import DTYPES, ShardedModel
from megatrain.parallel.tensor import partial_gradients


def check_torch() -> None:
    """Raise ConfigError where torch's FSDP2 cannot be told to sum gradients, rather than to average them."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f"parallel.engine is fsdp2, for which torch {torch.__version__} is too old (its FSDPModule has no "
            "set_force_sum_reduction_for_comms). Install a newer one, or set parallel.engine=deepspeed."
        )


class FSDP2Sharding:
    """See megatrain.parallel.engine.Sharding."""

    is_replicated = False

    def __init__(self, config: RunConfig, model: ShardedModel, groups: Groups) -> None:
        check_torch()
        train = config.train
        self._groups, self._specs, self._chunks = groups, model.specs, model.chunks
        self._stage, self._clip = config.parallel.zero_stage, train.gradient_clipping
        self.passes_together = groups.gradient.size() > 1
        self._is_half = train.precision != "fp32"
        self.dynamic_scale = DynamicLossScale.of(train, groups.device)
        self._gradient_scale: float | Tensor = 1.0  # by which gradients are too large until the update
        policy = MixedPrecisionPolicy(DTYPES[train.precision], torch.float32, cast_forward_inputs=False)
        shard = functools.partial(fully_shard, mesh=groups.gradient, mp_policy=policy)
        for chunk in self._chunks:  # on the meta device: memory is given to this rank's rows alone
            chunk.compute_dtype = DTYPES[train.precision]
            for parameter in chunk.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(chunk.compute_dtype)
            _shard_layers(chunk, shard, frees=self._stage == 3)
            chunk.to_empty(device=groups.device)
            chunk.tie_weights()  # to_empty gave each module a weight of its own
        self._modules = [m for chunk in self._chunks for m in chunk.modules() if isinstance(m, FSDPModule)]
        for module in self._modules:
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        self._parameters, self._own, self._frozen = model.parameters(), model.updated(), model.frozen()
        assert all(isinstance(p, DTensor) for p in self._parameters.values())
        assert all(p.dtype == torch.float32 for p in self._own.values())
        self._scale: ParameterScale | None = None
        if config.optimizer.scale_parameter:
            self._scale = ParameterScale({name: self._specs[name] for name in self._own}, groups, is_replicated=False)
        self._optimizer = make_optimizer(config, self._own, self._specs, self._scale)
        self._state_kinds = state_kinds(config.optimizer)
        self._partial = partial_gradients(model.chunks, model.specs, config)
        self._shared = model.shared_updated()

    def begin_step(self, num_micro_batches: int, num_targets: int) -> float | Tensor:
        """See Sharding. In half precision a power of two (see megatrain.parallel.loss_scale)."""
        per_target = 1.0 / num_targets
        if not self._is_half:
            return per_target
        rest = power_of_two_below(per_target) / per_target
        self._gradient_scale = rest if self.dynamic_scale is None else rest * self.dynamic_scale.value
        return backward_factor(per_target, self.dynamic_scale)

    def forward(self, chunk: int, received: Record | None, batch: Batch | InferenceBatch) -> Record | Tensor:
        """See Sharding."""
        output: Record | Tensor = self._chunks[chunk](batch, received)
        return output

    def backward(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
        """See Sharding."""
        module = self._chunks[chunk]
        module.set_is_last_backward(is_last_of_chunk)
        module.set_requires_gradient_sync(is_last_of_chunk or self._stage >= 2)
        module.set_reshard_after_backward(is_last_of_chunk or self._stage == 3)
        scalar.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, lr: float, approve: Callable[[float], bool] | None) -> Update:
        """See Sharding. It waits for the device only where ``approve`` is asked: whether to skip, and by what to clip,
        the device decides."""
        self._sum_shared_gradients()
        self._sum_replicated_gradients()
        norm = self._gradient_norm()
        if self._scale is not None:
            self._scale.measure(Part(name, p, _local(p).view(-1)) for name, p in self._own.items())
        skipped = overflow = ~norm.isfinite()
        if approve is not None and math.isfinite(on_host := float(norm)) and not approve(on_host):
            skipped = torch.ones_like(overflow)
        else:
            self._update(lr, norm, overflow)
        self._optimizer.zero_grad()
        self._copy_shared_weights()
        if self.dynamic_scale:
            self.dynamic_scale.update(overflow=overflow)
        return Update(norm, skipped)

    @contextlib.contextmanager
    def gathered(self, layer: Any) -> Iterator[None]:
        """See Sharding."""
        layer.unshard()
        yield
        layer.reshard()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """See Sharding."""
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk in self._chunks:
            chunk.train()
        self._reshard()

    @torch.no_grad()
    def slices(self) -> Iterator[MasterSlice]:
        """See Sharding."""
        return self._slices(self._own)

    def frozen_slices(self) -> Iterator[MasterSlice]:
        """See Sharding."""
        return self._slices(self._frozen)

    def _slices(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[MasterSlice]:
        """A data rank holds consecutive rows; the last ones fewer, or none."""
        index, size = self._groups.gradient.get_local_rank(), self._groups.gradient.size()
        for name, parameter in parameters.items():
            master = _local(parameter).view(-1)
            if master.numel():
                num_rows, *row = parameter.shape
                start = index * -(-num_rows // size) * math.prod(row)
                state = self._optimizer.state.get(parameter, {})
                yield MasterSlice(
                    name, start, master, {kind: _local(x).view(-1) for kind, x in state.items() if kind != "step"}
                )

    def misplaced(self) -> str | None:
        """See Sharding. The masters are the parameters themselves."""
        return None

    @torch.no_grad()
    def reset_optimizer_state(self, num_updates: int) -> None:
        """See Sharding."""
        for parameter in self._own.values():
            reset_state(self._optimizer.state[parameter], parameter, self._state_kinds, num_updates)

    @torch.no_grad()
    def sync_params_from_master(self) -> None:
        """See Sharding. The next forward pass gathers what was written."""
        self._reshard()
        self._copy_shared_weights()

    def replicas(self) -> Iterator[Replicas]:
        """See Sharding. Nothing along the data axis, where each rank has other rows."""
        for group, names in tensor_replicas(self._specs, self._groups):
            yield Replicas(group, {name: _local(self._parameters[name]) for name in names}, may_drift=True)
        for shared in self._shared:
            yield Replicas(shared.group, {self._specs[shared.name].name: _local(shared.weight)}, may_drift=True)

    def close(self) -> None:
        """See Sharding. Nothing is kept outside."""

    def _reshard(self) -> None:
        """Free what the last forward passes gathered."""
        for module in self._modules:
            module.reshard()

    def _update(self, lr: float, norm: Tensor, overflow: Tensor) -> None:
        """Unscale, clip and update in one pass, if the norm is finite: the device decides."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scale = torch.ones_like(norm) * self._gradient_scale
        if self._clip > 0.0:
            scale *= ((norm + 1e-6) / self._clip).clamp(min=1.0)
        optimizer: Any = self._optimizer  # torch's fused optimizers read these, as torch.amp.GradScaler sets them
        optimizer.grad_scale, optimizer.found_inf = scale, overflow.float()
        optimizer.step()

    def _gradient_norm(self) -> Tensor:
        """Of all ranks' gradients together, each distinct weight's once."""
        counted = [_local(p.grad) for name, p in self._own.items() if self._specs[name].replica == 0]
        square = torch.zeros((), device=self._groups.device)
        if counted:
            square += torch.nn.utils.get_total_norm(counted) ** 2
        dist.all_reduce(square)
        return square.sqrt() / self._gradient_scale

    def _sum_replicated_gradients(self) -> None:
        """Give tensor ranks one gradient of what they hold alike: the sum of their parts; where each has the whole one,
        the first rank's. Two ranks that computed or summed it by themselves might round otherwise, and drift apart."""
        for group, alike in tensor_replicas(self._specs, self._groups):
            names = [name for name in alike if name in self._own]
            shares = [_local(self._parameters[name].grad).view(-1) for name in names]
            for name, share in zip(names, shares, strict=True):
                if name not in self._partial and self._specs[name].replica:
                    share.zero_()
            if sum(share.numel() for share in shares):
                total = torch.cat(shares)
                dist.all_reduce(total, group=group)
                torch._foreach_copy_(shares, torch.split(total, [share.numel() for share in shares]))

    def _sum_shared_gradients(self) -> None:
        """Add the gradients of copies to those of the weights. Both are cut among the data ranks alike, so that shares
        are sent, after their sum over the data ranks."""
        for shared in self._shared:
            dist.reduce(_local(shared.weight.grad), shared.owner, group=shared.group)

    def _copy_shared_weights(self) -> None:
        """Give copies the values of the weights; they are out of the optimizer."""
        for shared in self._shared:
            shared.weight.grad = None
            dist.broadcast(_local(shared.weight), shared.owner, group=shared.group)


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's rows of a parameter, its gradient or its state: a view of the memory that they are kept in."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        rows: Tensor = tensor.to_local()
        return rows


def _shard_layers(chunk: Any, shard: Callable[..., Any], *, frees: bool) -> None:
    """Make groups of messages: of each decoder layer, of the embeddings, of the last layers; what is left
    (tied weights, which torch asks to be in one group) goes with the chunk. A relative bias is within a layer, but used
    before it, and by others: a group of its own. ``frees``: weights after a forward pass, but for those that the
    backward pass begins with."""
    for name in (*chunk.bias_names, *chunk.decoder_names):
        shard(chunk.get_submodule(name), reshard_after_forward=frees)
    embeddings = [chunk.get_submodule(name) for name in chunk.embedding_names]
    if chunk.head_name is None or not embeddings or not chunk.config.is_tied:
        if embeddings:
            shard(embeddings, reshard_after_forward=frees)
        if chunk.head_name is not None:
            shard([chunk.get_submodule(name) for name in chunk.last_names], reshard_after_forward=False)
    shard(chunk, reshard_after_forward=False)

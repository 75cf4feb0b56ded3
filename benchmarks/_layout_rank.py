"""One rank of benchmarks/layouts.py: trains each layout for some steps and measures what it holds and what it sends.

Memory is counted by storage, not by tensor: views and tied weights once. Messages are counted where PyTorch hands them
to the process group, whoever called: this project, DeepSpeed or torch.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.topology import Topology
from megatrain.model.init import InitialWeights
from megatrain.parallel.deepspeed import start_deepspeed
from megatrain.plan.stages import shared_weights
from megatrain.train.assemble import build_engine

TIMEOUT_SECONDS = 300.0
NUM_STEPS = 2  # the state of the optimizer is made in the first, the second is measured

_OPS = torch.ops.c10d
_KINDS = {
    _OPS.allreduce_.default: "all-reduce",
    _OPS._allgather_base_.default: "all-gather",
    _OPS.allgather_.default: "all-gather",
    _OPS._reduce_scatter_base_.default: "reduce-scatter",
    _OPS.reduce_scatter_.default: "reduce-scatter",
    _OPS.reduce_.default: "reduce",
    _OPS.broadcast_.default: "broadcast",
    _OPS.alltoall_base_.default: "all-to-all",
    _OPS.send.default: "point-to-point",
}
# Where DeepSpeed's optimizers keep gradients beside .grad: BF16_Optimizer, stages 1 and 2, stage 3.
_GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
_SENDS_NOTHING = {_OPS.recv_.default, _OPS.barrier.default}


class SentBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what this rank sends, by kind of collective, as the ring algorithms send it.

    With g ranks and n bytes on each: all-reduce 2 (g - 1) / g n; reduce-scatter and all-to-all (g - 1) / g n;
    all-gather (g - 1) n, n being a shard; a point-to-point message n; reduce and broadcast in a chain: n, but for its
    last rank. ``payload``: n by itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func not in _SENDS_NOTHING:
            self._count(_KINDS[func], args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        size = group.size()
        # The operations with an output and an input have the output first.
        given = args[1] if kind in ("all-gather", "reduce-scatter", "all-to-all") else args[0]
        num_bytes = sum(x.numel() * x.element_size() for x in _tensors(given))
        factor = {
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": (size - 1) / size,
            "all-to-all": (size - 1) / size,
            "all-gather": size - 1,
            "point-to-point": 1,
        }.get(kind)
        if factor is None:
            root = next(arg for arg in args if isinstance(arg, int))
            is_last = group.rank() == ((root if kind == "reduce" else root - 1) % size)
            factor = 0 if is_last else 1
            if kind == "reduce":  # each rank is sent what it owns: together a reduce-scatter
                kind = "reduce-scatter"
        self.payload[kind] += num_bytes if size > 1 else 0
        self.bytes[kind] += round(factor * num_bytes)


class Activations:
    """The largest number of bytes that autograd kept at one time for backward passes, parameters apart.

    What is freed in the meantime is no longer counted, so that in a pipeline it is the micro-batches in flight.
    """

    def __init__(self, weights: Callable[[], list[Tensor]]) -> None:
        self.now = self.peak = self.peak_parameters = 0
        self._weights = weights
        self._num_uses: Counter[int] = Counter()

    def watch(self) -> AbstractContextManager[Any]:
        """Watch what is saved in this context."""
        return saved_tensors_hooks(lambda x: _Saved(x, self), lambda saved: saved.tensor)

    def kept(self, tensor: Tensor) -> bool:
        """Count a tensor; False if it is a parameter's."""
        place = tensor.untyped_storage().data_ptr()
        storages = (_local(x).untyped_storage() for x in self._weights())
        whole = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak_parameters = max(self.peak_parameters, sum(whole.values()))  # under ZeRO 3 they come and go
        if place in whole:
            return False
        self._num_uses[place] += 1
        if self._num_uses[place] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)
        return True

    def freed(self, tensor: Tensor) -> None:
        """Count a tensor no longer."""
        place = tensor.untyped_storage().data_ptr()
        self._num_uses[place] -= 1
        if self._num_uses[place] == 0:
            self.now -= tensor.untyped_storage().nbytes()


class _Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor, activations: Activations) -> None:
        self.tensor = tensor
        self._activations = activations if activations.kept(tensor) else None

    def __del__(self) -> None:
        if self._activations is not None:
            self._activations.freed(self.tensor)


def measure_cases(rank: RankInfo, cases: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Measure each case, a config, on all ranks: each rank's figures, in rank order. Collective."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start_deepspeed(TIMEOUT_SECONDS)
    made: dict[tuple[Topology, int, tuple[tuple[int, ...], ...]], Groups] = {}  # a mesh's groups cannot be freed
    for case in cases:
        config = RunConfig.model_validate(case)
        topology = Topology.of(rank.world_size, config.parallel.tensor, config.parallel.pipeline)
        mesh = topology, config.model.kv_heads, tuple(shared_weights(config).values())
        if mesh not in made:
            made[mesh] = make_groups(topology, rank.rank, torch.device("cpu"), TIMEOUT_SECONDS, *mesh[1:])
        groups = made[mesh]
        others = _live_tensors()
        engine = build_engine(config, groups)
        engine.load_fragments(InitialWeights(config.model, config.run.seed), num_updates=0)
        engine.sync_params_from_master()
        found = _measure(engine, config, topology.data, others)
        found["stage"] = groups.coordinate.pipeline
        yield groups.all_gather_object(found)
        engine.close()
        del engine, others
        gc.collect()


def _measure(engine: Any, config: RunConfig, data: int, others: list[Tensor]) -> dict[str, Any]:
    num_micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * data)
    shape = (config.train.micro_batch_size, config.data.seq_len)
    batches = [_batch(shape, config.model.vocab_size or 0, seed) for seed in range(num_micro_batches)]
    num_targets = config.train.global_batch_size * config.data.seq_len
    for _ in range(NUM_STEPS - 1):
        engine.train_batch(batches, num_targets, 1e-4)
    held, sent = Held(engine, others), SentBytes()
    with sent, held.watch():
        engine.train_batch(batches, num_targets, 1e-4)
    return {**held.bytes, "sent": dict(sent.bytes), "payload": dict(sent.payload)}


class Held:
    """What a rank holds in a step, in bytes, each storage in the first kind it belongs to.

    Activations and whole parameters: the most at any time. Parameters and gradients: the most between passes. The
    others: between the last backward pass and the update. What was there before the engine (``others``) is not counted.
    """

    def __init__(self, engine: Any, others: list[Tensor]) -> None:
        self.bytes: Counter[str] = Counter()
        self._sharding = engine._sharding
        self._fsdp = [each for module in getattr(self._sharding, "_modules", ()) for each in _fsdp_parameters(module)]
        deepspeed = getattr(self._sharding, "_deepspeed", None)
        self._modules = self._sharding._chunks if deepspeed is None else [deepspeed.module]
        self._parameters = [p for module in self._modules for p in module.parameters()]
        self._optimizer = self._sharding._optimizer if deepspeed is None else deepspeed.optimizer
        self._others = others
        self._pipeline = engine._pipeline

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Fill ``bytes`` from the step that is made in this context."""
        step, activations = self._optimizer.step, Activations(self._weights)

        def measured_step(*args: Any, **kwargs: Any) -> Any:
            self._take()
            return step(*args, **kwargs)

        def take_before_pass(_: Any, arguments: tuple[Any, ...]) -> None:
            if not (isinstance(arguments[0], int) and arguments[0] < 0):  # DeepSpeed's weights that are apart: no pass
                self._take_between_passes()

        hooks = [module.register_forward_pre_hook(take_before_pass, prepend=True) for module in self._modules]
        kept: list[_Saved] = []

        def keep_context(_: Any, arguments: tuple[Any, ...]) -> None:
            """What a layer that is computed again is called with beside its input, which autograd does not see."""
            leaves = tree_leaves(arguments[1:])
            kept.extend(_Saved(x, activations) for x in _tensors(leaves) if x.is_floating_point())

        hooks += [
            each.register_forward_pre_hook(keep_context)
            for module in self._modules
            for each in module.modules()
            if isinstance(vars(each).get("forward"), functools.partial)
        ]
        backward = self._pipeline._backward

        def measured_backward(*args: Any, **kwargs: Any) -> None:
            self._take_gradients(set())
            backward(*args, **kwargs)
            kept.clear()

        self._optimizer.step, self._pipeline._backward = measured_step, measured_backward
        with activations.watch():
            yield
        self._optimizer.step, self._pipeline._backward = step, backward
        for hook in hooks:
            hook.remove()
        self.bytes |= {"activations": activations.peak, "whole parameters": activations.peak_parameters}

    def _take(self) -> None:
        gc.collect()
        states = self._sharding._optimizer.state
        state = [*self._masters(), *(x for values in states.values() for x in _tensors(values))]
        rest = _live_tensors()
        seen: set[int] = set()
        _storage_bytes(self._others, seen)
        self._take_between_passes(seen, state)
        self.bytes["buffers"] = _storage_bytes(rest, seen)

    def _take_between_passes(self, seen: set[int] | None = None, state: Sequence[Tensor] = ()) -> None:
        seen = set() if seen is None else seen
        for kind, tensors in {"parameters": self._weights(), "optimizer": state}.items():
            self.bytes[kind] = max(self.bytes[kind], _storage_bytes(_tensors(tensors), seen))
        self._take_gradients(seen)

    def _take_gradients(self, seen: set[int]) -> None:
        owners = [*self._parameters, *self._masters(), *(each._unsharded_param for each in self._unsharded())]
        gradients = [getattr(x, name, None) for x in owners for name in ("grad", "grad_accum")]
        gradients += [getattr(self._optimizer, name, None) for name in _GRADIENTS]
        gradients += [each.unsharded_accumulated_grad for each in self._fsdp]
        gradients += getattr(self._sharding, "_copied_sums", {}).values()  # of copies that DeepSpeed does not update
        gradients += [kept._flat for kept in getattr(self._sharding, "_kept", ())]  # parts that tensor ranks sum up
        self.bytes["gradients"] = max(self.bytes["gradients"], _storage_bytes(_tensors(gradients), seen))

    def _weights(self) -> list[Tensor]:
        """This rank's parameters, and what there is of whole ones now."""
        gathered = [x for each in self._fsdp for x in (each._sharded_param_data, *each.all_gather_outputs)]
        return [*self._parameters, *(p.ds_tensor for p in self._parameters if hasattr(p, "ds_tensor")), *gathered]

    def _unsharded(self) -> list[Any]:
        return [each for each in self._fsdp if hasattr(each, "_unsharded_param")]

    def _masters(self) -> list[Tensor]:
        return [] if self._fsdp else self._sharding._buffers()


def _fsdp_parameters(module: Any) -> list[Any]:
    """What FSDP2 knows of each parameter of a module's own group: there is no public way to see what it holds."""
    return [each for group in fully_shard.state(module)._fsdp_param_groups for each in group.fsdp_params]  # type: ignore[attr-defined]


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _live_tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) is Tensor]


def _storage_bytes(tensors: list[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        try:
            storage = _local(tensor).untyped_storage()
        except NotImplementedError:  # an undefined one of torch's own, up to 2.8
            continue
        if storage.device.type == "cpu" and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [x for item in nested for x in _tensors(item)] if isinstance(nested, (list, tuple)) else []


def _batch(shape: tuple[int, int], vocab_size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens_BT, targets_BT = torch.randint(vocab_size, (2, *shape), generator=generator)
    positions_BT = torch.arange(shape[1]).expand(shape)
    sample_ids_B = torch.arange(shape[0])
    return Batch(tokens_BT, targets_BT, None, positions_BT, None, sample_ids_B)

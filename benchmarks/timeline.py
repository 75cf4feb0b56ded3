"""What should a step take on a GPU? Arithmetic, without one: nothing here is measured.

A step of each model of `benchmarks/gpu.py` is traced at its real shapes on the meta device, whose tensors have no
memory, with a GPU's kernels for attention and norms: the project's own layers, head and loss, forward and backward, the
fp32 sums of gradients, their norm, fused AdamW. Each operation of the trace takes what is longer: its FLOPs at the
device's rate, or the bytes that it reads and writes at the memory's bandwidth (the roofline; Williams et al. 2009). How
much of these rates kernels reach is what `megatrain plan` assumes (megatrain/plan/arithmetic.py).

- eager: every operation reads its operands from memory and writes its results to it.
- compiled: within decoder layers, what stands between two products is one kernel: it reads what comes from outside and
  writes what is needed later. What the backward pass alone needs of single elements is computed there again.

    python benchmarks/timeline.py [--models 160m 0.5b 1.5b 3b] [--device h100]

Prints Markdown tables, those of docs/performance.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks._bare_loop import Shape
from benchmarks._gpu_models import MODELS, TINY, config_of
from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.model.attention import CoreAttention
from megatrain.model.block import Activation, DecoderLayer, SelfAttention
from megatrain.model.context import Context
from megatrain.model.embedding import ImageEmbedding, PositionEmbedding, SegmentEmbedding, TokenEmbedding
from megatrain.model.encoder_decoder import whole_model
from megatrain.model.linear import Linear
from megatrain.model.loss import OutputHead
from megatrain.model.masked_attention import MaskedAttention
from megatrain.model.norm import LayerNorm, RmsNorm
from megatrain.model.relative_bias import RelativeBias
from megatrain.plan.arithmetic import Rates
from megatrain.plan.flops import flops_per_token, num_parameters
from megatrain.plan.hardware import Device, find_device

aten: Any = torch.ops.aten
NUM_MICRO_BATCHES = 2
ATTENTION_SHARE = 0.85
"""Of the rate of products, as plan has it for flash attention that uses the device's own instructions."""
FLASH, FLASH_BACKWARD = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
PARTS: dict[type[nn.Module], str] = {
    **dict.fromkeys((TokenEmbedding, PositionEmbedding, SegmentEmbedding, ImageEmbedding), "embedding"),
    Linear: "layers: products",
    **dict.fromkeys((CoreAttention, MaskedAttention, RelativeBias), "layers: attention"),
    SelfAttention: "layers: rotary",
    **dict.fromkeys((RmsNorm, LayerNorm), "norms"),
    Activation: "layers: activation",
    DecoderLayer: "layers: residuals",
    OutputHead: "head and loss",
}
SUMS, UPDATE, OTHER = "sums of gradients", "norm, update, cast", "other"


class Place(NamedTuple):
    """What a step is at. ``in_layer``: within a decoder layer."""

    part: str
    in_layer: bool = False
    is_backward: bool = False


@dataclass
class Operation:
    """``reads``, ``writes``: bytes by storage. ``is_alone``: no compiler fuses it with others."""

    name: str
    place: Place
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    is_alone: bool
    product: tuple[int, int, int] | None
    """m, n and k of [m, k] x [k, n]."""

    @property
    def is_fused(self) -> bool:
        return self.place.in_layer and not self.is_alone


class Trace(TorchDispatchMode):
    """The operations that run within it, but for those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.place = Place(OTHER)
        self._nodes: set[Any] = set()  # of the backward pass
        self._kept: list[Any] = []  # so that no storage takes the identity of another

    def name(self, module: nn.Module) -> None:
        """Let a module's operations, forward and backward, have its part."""
        forward, part = module.forward, next((part for kind, part in PARTS.items() if isinstance(module, kind)), None)

        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.place
            in_layer = before.in_layer or isinstance(module, DecoderLayer)
            self.place = Place(before.part if part is None else part, in_layer)
            out = forward(*args, **kwargs)
            inputs = {x.grad_fn for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            self._tag(out.grad_fn, inputs, self.place._replace(is_backward=True))
            self.place = before
            return out

        module.forward = run  # type: ignore[method-assign]

    def _tag(self, node: Any, inputs: set[Any], place: Place) -> None:
        """Let the nodes from here back to those of the inputs, and of modules within, say where they are."""
        waiting, seen = [node], {None, *inputs}
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            if node not in self._nodes:
                self._nodes.add(node)
                node.register_prehook(lambda _: setattr(self, "place", place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.is_view or name == "_unsafe_view" or "empty" in name:
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        changed = [x for k, x in _arguments(func, args, kwargs) if k for x in tree_leaves(x) if isinstance(x, Tensor)]
        self._kept += [x.untyped_storage() for x in (*given, *made)]  # of a tensor, autograd would copy what is kept
        is_filled = name.strip("_") in ("fill", "zero", "copy", "foreach_zero", "foreach_copy")
        read = [x for x in given if not (is_filled and any(x is y for y in changed))]
        flops = _flops(func, name, args, kwargs, result)
        is_alone = flops > 0 or name.startswith(("_foreach", "_fused_adam", "embedding"))
        sizes = _sizes(read), _sizes([*made, *changed])
        left, right = args[-2:] if name in ("mm", "addmm") else (None, None)
        product = None if left is None else (left.shape[0], right.shape[1], left.shape[1])
        self.operations.append(Operation(name, self.place, flops, *sizes, is_alone, product))
        return result


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Iterator[tuple[bool, Any]]:
    """Each argument, with whether the operation writes to it."""
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else (kwargs or {}).get(argument.name)
        yield argument.alias_info is not None and argument.alias_info.is_write, value


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage; an expanded dimension is in memory once."""
    sizes: dict[int, int] = {}
    for x in tensors:
        elements = math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        key = x.untyped_storage()._cdata
        sizes[key] = max(sizes.get(key, 0), elements * x.itemsize)
    return sizes


def _flops(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None, result: Any) -> float:
    if name in (FLASH, FLASH_BACKWARD):
        # Two products forward, five backward (one again); causal kernels leave out half of each.
        query = args[0] if name == FLASH else args[1]
        batch, heads, length, width = query.shape
        return float((2 if name == FLASH else 5) * batch * heads * length * length * width)
    count = flop_registry.get(func._overloadpacket)
    return float(count(*args, **(kwargs or {}), out_val=result)) if count else 0.0


def _flash(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, context: Context) -> Tensor:
    """The kernel that a GPU takes, as that of the norm below: for the meta device PyTorch chooses neither."""
    heads = [x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD)]
    out: Tensor = aten._scaled_dot_product_flash_attention(*heads, 0.0, True)[0]
    return out.transpose(1, 2)


@torch.library.custom_op("timeline::rms_norm", mutates_args=())
def _norm(x_BTC: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    """A GPU's kernel: it keeps a number a token."""
    raise NotImplementedError


@torch.library.custom_op("timeline::rms_norm_backward", mutates_args=())
def _norm_backward(grad_BTC: Tensor, x_BTC: Tensor, scale_BT: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


_norm.register_fake(lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)))
_norm_backward.register_fake(lambda grad, x, scale, weight: (torch.empty_like(x), torch.empty_like(weight)))
_norm.register_autograd(
    lambda ctx, grad, _: _norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output[1], inputs[1]),
)


def _fused_norm(norm: RmsNorm, x_BTC: Tensor, context: Context | None = None) -> Tensor:
    out: Tensor = _norm(x_BTC, norm.weight)[0]
    return out


def _meta_batch(config: RunConfig) -> Batch:
    """What a model reads in a micro-batch; numbers alone, no contents."""
    model, seq_len, count = config.model, config.data.seq_len, config.train.micro_batch_size
    tokens, targets = (
        torch.empty((count, length), dtype=torch.int64)
        for length in (config.target_len or seq_len, config.target_len or config.objective.most_targets(model, seq_len))
    )
    batch = Batch(tokens, targets, None, tokens.clone(), None, torch.empty(count, dtype=torch.int64))
    if model.description.asks_at_places:
        batch = batch._replace(target_places_BM=targets.clone())
    if model.description.encoder is not None:
        batch = batch._replace(source_tokens_BS=torch.empty((count, seq_len), dtype=torch.int64))
    if model.description.reads_images:
        size = getattr(model, "image_size")  # noqa: B009 (a family's own key)
        batch = batch._replace(pixels_BCHW=torch.empty((count, model.sizes["channels"], size, size)))
    return batch


def trace_step(config: RunConfig) -> list[Operation]:
    """All operations of a step in bf16 with fp32 masters, in their order."""
    with torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        model = whole_model(config.model)
        torch.set_default_dtype(torch.float32)
        for module in model.modules():
            if isinstance(module, CoreAttention):
                module.forward = _flash  # type: ignore[method-assign]
            elif isinstance(module, RmsNorm):
                module.forward = partial(_fused_norm, module)  # type: ignore[method-assign]
        weights = list(model.parameters())
        masters, sums, means, squares = ([torch.empty(p.shape) for p in weights] for _ in range(4))
        steps = [torch.empty(()) for _ in weights]
        batch, trace = _meta_batch(config), Trace()
        for module in model.modules():
            if module is not model:
                trace.name(module)
        with trace:
            for _ in range(NUM_MICRO_BATCHES):
                trace.place = Place(OTHER)
                model(batch).backward()
                trace.place = Place(SUMS)
                torch._foreach_add_(sums, [p.grad for p in weights if p.grad is not None])
                model.zero_grad(set_to_none=True)
            trace.place = Place(UPDATE)
            torch.nn.utils.get_total_norm(sums)
            torch._fused_adamw_(
                masters,
                sums,
                means,
                squares,
                [],
                steps,
                lr=1e-4,
                beta1=0.9,
                beta2=0.95,
                weight_decay=0.1,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](weights), masters)
            torch._foreach_zero_(sums)
    return trace.operations


@dataclass(frozen=True)
class Cost:
    """Of a part: kernels, FLOPs, bytes, seconds."""

    kernels: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def cost(operation: Operation, rates: Rates) -> Cost:
    """By itself."""
    num_bytes = sum(operation.reads.values()) + sum(operation.writes.values())
    if operation.product is not None:
        seconds = rates.product(*operation.product)
    elif operation.flops:
        seconds = rates.moved(0) + operation.flops / (rates.products * ATTENTION_SHARE)
    else:
        seconds = rates.moved(num_bytes)
    return Cost(1, operation.flops, num_bytes, seconds)


def eager(operations: Sequence[Operation], rates: Rates) -> dict[str, Cost]:
    costs: dict[str, Cost] = defaultdict(Cost)
    for operation in operations:
        costs[operation.place.part] += cost(operation, rates)
    return costs


def compiled(operations: Sequence[Operation], rates: Rates) -> dict[str, Cost]:
    """A run of operations in layers that are not alone is one kernel, whose bytes its operations share as they had
    them by themselves."""
    costs: dict[str, Cost] = defaultdict(Cost)
    readers: dict[int, list[int]] = defaultdict(list)
    for index, operation in enumerate(operations):
        for key in operation.reads:
            readers[key].append(index)
    again = _computed_again(operations, readers)
    run: list[Operation] = []
    ends: list[Operation | None] = [*operations, None]
    for index, operation in enumerate(ends):
        if operation is not None and operation.is_fused:
            run.append(operation)
            continue
        if run:
            num_bytes = _bytes_of(run, again, lambda key, end=index: any(reader >= end for reader in readers[key]))
            alone = [cost(each, rates) for each in run]
            whole = sum(each.bytes for each in alone)
            for each, by_itself in zip(run, alone, strict=True):
                share = num_bytes * by_itself.bytes / whole if whole else 0.0
                costs[each.place.part] += Cost(0, 0.0, share, rates.moved(share, 0))
            costs[run[0].place.part] += Cost(1, seconds=rates.moved(0))
            run = []
        if operation is not None:
            costs[operation.place.part] += cost(operation, rates)
    return costs


def _computed_again(operations: Sequence[Operation], readers: Mapping[int, Sequence[int]]) -> set[int]:
    """What a kernel of the forward pass makes for those of the backward pass alone: it is computed there again, from
    what they read anyway. But for what is not of one element by itself: the numbers of norms."""
    found = set()
    for index, operation in enumerate(operations):
        if operation.is_fused and not operation.place.is_backward and operation.place.part != PARTS[RmsNorm]:
            for key in operation.writes:
                later = [operations[reader] for reader in readers.get(key, ()) if reader > index]
                outside = [each for each in later if each.place.is_backward or not each.is_fused]
                if outside and all(each.is_fused and each.place.is_backward for each in outside):
                    found.add(key)
    return found


def _bytes_of(run: Sequence[Operation], again: set[int], is_read_later: Callable[[int], bool]) -> int:
    """Of a kernel: what it reads from outside, and writes for others."""
    outside: dict[int, int] = {}
    written: dict[int, int] = {}
    for operation in run:
        outside |= {key: size for key, size in operation.reads.items() if key not in written}
        written |= operation.writes
    stored = {key: size for key, size in written.items() if is_read_later(key)}
    return sum(size for sizes in (outside, stored) for key, size in sizes.items() if key not in again)


@dataclass(frozen=True)
class Timeline:
    """A model's step."""

    config: RunConfig
    eager: Mapping[str, Cost]
    compiled: Mapping[str, Cost]

    @classmethod
    def of(cls, shape: Shape, micro_batch: int, rates: Rates) -> Timeline:
        config = RunConfig.model_validate(config_of(shape, micro_batch, Path(), "run", "fsdp2", "bf16"))
        operations = trace_step(config)
        return cls(config, eager(operations, rates), compiled(operations, rates))

    def mfu(self, costs: Mapping[str, Cost], device: Device) -> float:
        needed = flops_per_token(self.config.model, self.config.data.seq_len) * self.num_tokens
        return needed / device.half_flops / total(costs).seconds

    @property
    def num_tokens(self) -> int:
        return NUM_MICRO_BATCHES * self.config.train.micro_batch_size * self.config.data.seq_len


def total(costs: Mapping[str, Cost]) -> Cost:
    return sum(costs.values(), Cost())


def show(timelines: Mapping[str, Timeline], device: Device) -> None:
    names = list(timelines)
    titles = [f"{name} ({num_parameters(each.config.model) / 1e9:.2f}B)" for name, each in timelines.items()]
    print(f"| ms of a step: eager / compiled | {' | '.join(titles)} |")
    print(f"|---|{'---|' * len(names)}")
    for part in (*dict.fromkeys(PARTS.values()), SUMS, UPDATE, OTHER):
        pairs = [(each.eager.get(part, Cost()), each.compiled.get(part, Cost())) for each in timelines.values()]
        if any(one.seconds or other.seconds for one, other in pairs):
            cells = [f"{one.seconds * 1e3:,.1f} / {other.seconds * 1e3:,.1f}" for one, other in pairs]
            print(f"| {part} | {' | '.join(cells)} |")
    rows: dict[str, list[str]] = {name: [] for name in ("**step**", "kernels", "GB moved", "tokens/s", "MFU")}
    for each in timelines.values():
        pair = total(each.eager), total(each.compiled)
        rows["**step**"].append(" / ".join(f"{one.seconds * 1e3:,.1f}" for one in pair))
        rows["kernels"].append(" / ".join(f"{one.kernels:,}" for one in pair))
        rows["GB moved"].append(" / ".join(f"{one.bytes / 1e9:,.0f}" for one in pair))
        rows["tokens/s"].append(" / ".join(f"{each.num_tokens / one.seconds:,.0f}" for one in pair))
        rows["MFU"].append(" / ".join(f"{each.mfu(costs, device):.0%}" for costs in (each.eager, each.compiled)))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What should a step take on a GPU? Arithmetic alone.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="one tiny model")
    parser.add_argument("--device", default="h100", help="a name of megatrain/plan/hardware.py")
    options = parser.parse_args()
    if (device := find_device(options.device)) is None:
        sys.exit(f"--device {options.device} is not in megatrain/plan/hardware.py.")
    rates = Rates(device, "bf16", None)
    models = {"tiny": (TINY, 2)} if options.tiny else {name: MODELS[name] for name in options.models}
    peak, bandwidth = f"{rates.products / 1e12:.0f} TFLOP/s", f"{rates.bytes_per_second / 1e12:.2f} TB/s"
    print(f"Arithmetic, not measured: {device.name}, products at {peak} at the most, memory at {bandwidth}\n")
    show({name: Timeline.of(*model, rates) for name, model in models.items()}, device)


if __name__ == "__main__":
    main()

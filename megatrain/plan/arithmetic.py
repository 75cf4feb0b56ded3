"""Seconds of a device's arithmetic in one micro-batch, from the operations of its layers and their shapes.

A matrix product takes as long as its tiles, of which a device computes one on each of its units at a time, or as its
bytes at the memory's rate. Fused attention takes its products and one exponential for each pair of a query and a key.
All else (norms, rotation, activation, residuals, loss, sums of gradients) takes its bytes, and each kernel its start.
What is assumed beyond the device's data sheet is in the constants; docs/planning.md has their sources, and
benchmarks/plan_speed.py holds the result against published runs.

N: tokens of a micro-batch. A product is [m, k] x [k, n].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatrain.families.description import Linear
from megatrain.plan.flops import flops_of_head, flops_of_pair_layers, flops_of_weight, flops_per_token
from megatrain.plan.hardware import Device
from megatrain.plan.stage_model import StageModel, num_elements, share

SUSTAINED = 0.82
"""Of the fastest product that was measured on a device, at which it computes hour by hour, amid other kernels. Fitted
to published runs: best are 0.80 for all of the first set, 0.84 for megatrain's own."""
MEMORY_SHARE = 0.85
"""Of the memory's nominal bandwidth that kernels reach."""
_ATTENTION_SHARE = 0.85
"""Of the rate of products, those within fused attention."""
_FLASH_2_SHARE = 0.62
"""Of that with `model.attention: flash` on GPUs from Hopper on, whose own instructions it does not use."""
_AMPERE_FLOPS = 4e12
"""A second and unit, more than any before Hopper."""
_MATH_BYTES = (12, 16)
"""Moved for each pair of a query and a key where attention is written out, forward and backward; twice that in fp32."""
_TILES = ((128, 256), (256, 128), (128, 128))
_SMALL_TILE_SHARE = 0.85
"""Of the rate, with the smallest tile: each operand is read more often for it."""
_EDGE_DEPTH = 128
"""What a tile's start and end cost, as additional k."""
_SPLITS = (1, 2, 4, 8, 16)
_EXPONENTIALS = 16 * 1.7e9
"""A second and unit: 16 in a clock cycle ("CUDA C++ Programming Guide", arithmetic instructions)."""
_KERNEL_SECONDS = 3e-6
"""Between the work of a kernel and that of the next one."""
_EAGER_KERNELS = 3
"""Times as many, and as many passes over memory, where layers are not compiled: as measured with and without."""
_LOSS_BYTES, _VOCAB_PARALLEL_LOSS_BYTES = 12, 32
"""Moved for each logit between the head's product and its gradients', which are in one rank or cut among several."""
_SUM_BYTES = 10
"""Moved for each trained parameter and micro-batch: its gradient is read and added up in fp32."""


@dataclass(frozen=True)
class Rates:
    """What a device reaches in a precision. ``flat``: in place of all else, at this share of its peak."""

    device: Device
    precision: str
    flat: float | None

    @property
    def peak(self) -> float:
        return self.device.peak_flops(self.precision)

    @property
    def products(self) -> float:
        """FLOP/s of large products."""
        return self.peak * (self.flat or self.device.product_share * SUSTAINED)

    @property
    def bytes_per_second(self) -> float:
        return self.device.bytes_per_second * MEMORY_SHARE

    @property
    def element_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def product(self, m: int, n: int, k: int) -> float:
        """Seconds of one product."""
        if self.flat is not None:
            return 2 * m * n * k / self.products
        return _product(self, m, n, k)

    def moved(self, num_bytes: float, kernels: int = 1) -> float:
        """Seconds of kernels that only move so many bytes."""
        return num_bytes / self.bytes_per_second + kernels * _KERNEL_SECONDS


@lru_cache(maxsize=4096)
def _product(rates: Rates, m: int, n: int, k: int) -> float:
    units, bytes_ = rates.device.units, rates.element_bytes
    best = float("inf")
    for tile_m, tile_n in _TILES:
        tiles = share(m, tile_m) * share(n, tile_n)
        rate = rates.products / units * (1.0 if (tile_m, tile_n) != _TILES[-1] else _SMALL_TILE_SHARE)
        for split in _SPLITS:
            waves = share(tiles * split, units)
            computed = waves * 2 * tile_m * tile_n * (share(k, split) + _EDGE_DEPTH) / rate
            moved = bytes_ * (m * k + k * n + m * n) + (8 * split * m * n if split > 1 else 0)
            best = min(best, max(computed, moved / rates.bytes_per_second))
    return best + _KERNEL_SECONDS


def micro_batch_seconds(part: StageModel, rates: Rates) -> float:
    """Forward and backward passes of one micro-batch on a rank, with what recomputation repeats."""
    if rates.flat is not None or part.config.model.description.encoder is not None:
        return operations(part) / rates.products
    forward, backward, core = _layer(part, rates)
    recompute = part.config.parallel.recompute
    layers = part.num_layers * (forward + backward)
    layers += num_recomputed(part) * forward + (part.num_layers * core if recompute == "selective" else 0.0)
    return layers + _ends(part, rates)


def operations(part: StageModel) -> float:
    """FLOPs of one micro-batch on a rank, with those that recomputation repeats."""
    model, parallel, seq_len = part.config.model, part.config.parallel, part.config.data.seq_len
    if part.config.target_len is not None:
        repeated = 4 / 3 if parallel.recompute == "full" else 1.0
        of_layers = flops_of_pair_layers(model, seq_len, part.config.target_len)
        flops = sum(held.num_layers * each for held, each in zip(part.stacks, of_layers, strict=True))
        of_head = flops_of_head(model, None, 1.0) * part.config.target_len if part.is_last else 0
        return part.config.train.micro_batch_size * (repeated * flops + of_head) / parallel.tensor
    lora, predicted = part.config.lora, part.config.predicted_share
    of_weight = flops_of_weight(lora)
    head = flops_of_head(model, lora, predicted)
    layer = (flops_per_token(model, seq_len, lora, predicted) - head) / model.num_hidden_layers
    attention = 4 * model.num_attention_heads * model.head_size * seq_len  # forward
    layers = part.num_layers * layer
    if parallel.recompute == "full":
        layers += num_recomputed(part) * layer * 2 / of_weight
    elif parallel.recompute == "selective":
        layers += part.num_layers * attention
    return part.tokens * (layers + part.is_last * head) / parallel.tensor


def num_recomputed(part: StageModel) -> int:
    """Layers whose forward pass is made twice."""
    parallel = part.config.parallel
    if parallel.recompute != "full":
        return 0
    return sum(share(len(numbers), parallel.recompute_every) for layers in part.layers for numbers in layers)


def _layer(part: StageModel, rates: Rates) -> tuple[float, float, float]:
    """Seconds of a layer's forward pass, of its backward pass, and of what selective recomputation repeats."""
    forward = backward = 0.0
    for linear in _linears(part):
        of_product, of_gradients = _linear(part, rates, linear)
        forward, backward = forward + of_product, backward + of_gradients
    core, core_backward = _attention(part, rates)
    activation, activation_backward = _activation(part, rates)
    between, between_backward = _between(part, rates)
    forward += core + activation + between
    return forward, backward + core_backward + activation_backward + between_backward, core + activation


def _linears(part: StageModel) -> list[Linear]:
    block, lora = part.config.model.description.block, part.config.lora
    linears = [leaf for leaf in block.leaves.values() if isinstance(leaf, Linear)]
    if lora is not None:
        linears += [factor for path, factor in block.factors.items() if lora.adapts(path.rpartition(".")[0])]
    return linears


def _linear(part: StageModel, rates: Rates, linear: Linear) -> tuple[float, float]:
    """Seconds of its product, and of the gradients of its input and of its weight, where that is trained."""
    inputs, outputs = part.sizes[linear.inputs], sum(part.sizes[width] for width in linear.outputs)
    is_trained = part.config.lora is None or "rank" in (linear.inputs, *linear.outputs)
    of_weight = rates.product(outputs, inputs, part.tokens) if is_trained else 0.0
    return rates.product(part.tokens, outputs, inputs), rates.product(part.tokens, inputs, outputs) + of_weight


def _attention(part: StageModel, rates: Rates) -> tuple[float, float]:
    """Seconds of attention: two products forward; backward four, and fused the first one again (Dao 2023,
    "FlashAttention-2", arXiv:2307.08691). Written out it has no use of causality."""
    model, seq_len, device = part.config.model, part.config.data.seq_len, rates.device
    heads = part.config.train.micro_batch_size * part.sizes["queries"] / model.head_size
    if model.attention == "math":
        pairs = heads * seq_len**2
        product = 2 * model.head_size * pairs / rates.products
        forward, backward = (rates.moved(part.element_bytes / 2 * bytes_ * pairs, 5) for bytes_ in _MATH_BYTES)
        return 2 * product + forward, 4 * product + backward
    window = min(seq_len, model.attention_window or seq_len)
    pairs = heads * window * seq_len
    if model.description.block.attention.is_causal:
        pairs -= heads * window * (window - 1) / 2
    exponentials = pairs / (_EXPONENTIALS * device.units)
    is_older = model.attention == "flash" and device.half_flops > _AMPERE_FLOPS * device.units
    share_of_products = _ATTENTION_SHARE * (_FLASH_2_SHARE if is_older else 1.0)
    product = 2 * model.head_size * pairs / (rates.products * share_of_products)
    return 2 * product + exponentials + _KERNEL_SECONDS, 5 * product + exponentials + 3 * _KERNEL_SECONDS


def _activation(part: StageModel, rates: Rates) -> tuple[float, float]:
    """Seconds of the MLP's activation. Gated: gate and up are read, their product is written, and backward both, with
    the gradient of the product, are read, and two gradients and the product are written."""
    is_gated = part.config.model.description.block.mlp.is_gated
    ffn_bytes = part.element_bytes * part.tokens * part.sizes["ffn"] * _passes(part)
    forward, backward = (3, 6) if is_gated else (2, 3)
    return rates.moved(forward * ffn_bytes, _passes(part)), rates.moved(backward * ffn_bytes, _passes(part))


def _between(part: StageModel, rates: Rates) -> tuple[float, float]:
    """Seconds of two norms, two residual sums, rotation, and of adding up the gradients of an input that several
    products share."""
    config, block = part.config, part.config.model.description.block
    tokens = part.tokens // (config.parallel.tensor if config.parallel.sequence else 1)
    stream = part.element_bytes * tokens * config.model.hidden_size
    heads = part.element_bytes * part.tokens * (part.sizes["queries"] + part.sizes["keys"])
    rotated = 2 * heads if block.attention.rotates else 0
    shared = sum(count + 1 for count in (len(block.attention.inputs), len(block.mlp.inputs)) if count > 1)
    passes = _passes(part)
    forward = rates.moved(passes * (9 * stream + rotated), 4 * passes)
    return forward, rates.moved(passes * ((8 + shared) * stream + rotated + heads), 6 * passes)


def _ends(part: StageModel, rates: Rates) -> float:
    """Seconds of the embedding, the head and the loss, and of the sums of gradients."""
    hidden, vocab = part.config.model.hidden_size, part.answers
    seconds = rates.moved(_SUM_BYTES * num_elements(part.trained), len(part.trained))
    if part.is_first:
        seconds += rates.moved(6 * part.element_bytes * part.tokens * hidden, 3)
    if part.is_last:
        seconds += rates.product(part.targets, vocab, hidden) + rates.product(part.targets, hidden, vocab)
        if part.config.lora is None:
            seconds += rates.product(vocab, hidden, part.targets)
        of_logit = _LOSS_BYTES if part.config.parallel.tensor == 1 else _VOCAB_PARALLEL_LOSS_BYTES
        seconds += rates.moved(of_logit * part.targets * vocab, 6)
    return seconds


def _passes(part: StageModel) -> int:
    """How often memory is passed over, and kernels are started, beside once: compiled layers fuse chains of them."""
    config = part.config
    is_compiled = config.train.compile != "off" and not (
        config.parallel.engine == "deepspeed" and config.parallel.zero_stage == 3
    )
    return 1 if is_compiled else _EAGER_KERNELS

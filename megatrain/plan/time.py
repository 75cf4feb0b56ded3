"""How long a step takes: an estimate, by a model that is simple enough to check by hand.

Everything follows from the config and the devices:

- Arithmetic takes what the shapes of a rank's part of each layer make of it (megatrain.plan.arithmetic), or, where
  ``efficiency`` is given, its operations at that share of the device's peak. Operations are those of `flops_per_token`,
  and what recomputation repeats.
- A message takes its bytes over the share that collectives reach of the bandwidth of the link that its group's ring
  must pass, without latency. Bytes are those of docs/parallelism.md, where they were measured for each engine. Of
  tensor parallelism's, those of a backward pass are hidden by the products beside them; of those between data ranks,
  what the passes hide is in megatrain.plan.data_messages.
- 1F1B and interleaved: the micro-batches go through the slowest rank one after the other, and a part of one through all
  (Narayanan et al. 2021, arXiv:2104.04473).
- The update reads and writes this rank's share of the state once, at the memory's bandwidth.

What is left out: the latency of messages, waiting for data, evaluation and logging.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import RunConfig
from megatrain.plan.arithmetic import Rates, micro_batch_seconds, num_recomputed
from megatrain.plan.cluster import Cluster
from megatrain.plan.data_messages import data_seconds
from megatrain.plan.pipeline_schedule import bubble
from megatrain.plan.stage_model import StageModel, num_elements

HOST_BYTES_PER_SECOND = 25e9
"""Between a device and its share of the node's CPU memory, and within that: what PCIe of generation 4 reaches."""
_UPDATE_BYTES = 30  # a parameter: gradient, master weight and both means read, the last three and the weight written
_AVERAGE_BYTES = 12  # master weight and average read, the average written
_SCALE_BYTES = 20  # master weight read for its RMS; read and written as it is divided, and as it is multiplied


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go into, of the slowest rank. ``hidden``, ``hidden_tensor``: of messages between
    data and between tensor ranks that are sent while the rank computes, which are no part of the step."""

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float
    hidden: float = 0.0
    hidden_tensor: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """By name, what adds up to the step."""
        return {name: seconds for name, seconds in vars(self).items() if not name.startswith("hidden")}

    @property
    def step(self) -> float:
        return sum(self.parts.values())


def step_time(parts: list[StageModel], cluster: Cluster) -> StepTime:
    count = parts[0].num_micro_batches
    passes = [_Pass.of(part, cluster) for part in parts]
    slowest = max(passes, key=lambda each: each.seconds)
    data = [data_seconds(part, each.compute, cluster) for part, each in zip(parts, passes, strict=True)]
    waited = [
        each.waited + _shared(part, cluster) + _update(part, cluster) for part, each in zip(parts, data, strict=True)
    ]
    last = max(range(len(parts)), key=waited.__getitem__)
    others = sum(each.seconds for each in passes) - slowest.seconds
    return StepTime(
        compute=count * slowest.compute,
        tensor=count * slowest.tensor,
        pipeline=count * slowest.pipeline,
        bubble=others * _rounds_waited(parts[0]),
        data=data[last].waited + _shared(parts[last], cluster),
        update=_update(parts[last], cluster),
        hidden=data[last].hidden,
        hidden_tensor=count * slowest.hidden,
    )


def pipeline_bubble(config: RunConfig, num_micro_batches: int) -> float:
    """The idle share of the time where all chunks are alike: (p - 1) / (m + p - 1) for 1F1B, and with v chunks a rank,
    from p micro-batches on, (p - 1) / (v m + p - 1)."""
    waited = bubble(config.parallel.pipeline, config.parallel.pipeline_chunks, num_micro_batches)
    return waited / (1 + waited)


def _rounds_waited(part: StageModel) -> float:
    """How often a rank waits for a whole micro-batch's passes on the others: once in 1F1B, less with more chunks."""
    num_ranks, count = part.config.parallel.pipeline, part.num_micro_batches
    if num_ranks == 1:
        return 0.0
    return bubble(num_ranks, part.config.parallel.pipeline_chunks, count) * count / (num_ranks - 1)


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch, forward and backward, on a rank. ``hidden``: of tensor parallelism's messages."""

    compute: float
    tensor: float
    pipeline: float
    hidden: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.pipeline

    @classmethod
    def of(cls, part: StageModel, cluster: Cluster) -> _Pass:
        rates = cluster.rates(part.config.train.precision)
        waited, hidden = _tensor(part, cluster, rates)
        return cls(micro_batch_seconds(part, rates), waited, _pipeline(part, cluster), hidden)


def _tensor(part: StageModel, cluster: Cluster, rates: Rates) -> tuple[float, float]:
    """Seconds of messages that are waited for, and of those that the backward pass hides.

    A layer has four all-reduces of a [B, T, hidden] tensor (Megatron-LM), each of two halves: a scatter and a gather.
    Sequence parallelism sends the halves by themselves, and a third one where a layer is computed again. In the
    backward pass of column-parallel layers the input's gradient is on its way while the weights' are computed, and a
    gathered input comes again while the input's gradient is computed.
    """
    parallel, size = part.config.parallel, part.config.parallel.tensor
    if size == 1:
        return 0.0, 0.0
    half = _border(part) * (size - 1) / size / cluster.bandwidth(size, 1)
    losses = 2 * 12 * part.targets * part.is_last * (size - 1) / size / cluster.bandwidth(size, 1)  # 3 numbers a token
    halves = 2 * part.num_branches + 2 * (num_recomputed(part) + part.is_first)
    if parallel.sequence:
        halves += part.num_branches + num_recomputed(part) + part.is_first + part.is_last
    waited, hidden = half * halves + losses, 0.0
    for outputs, count in _column_outputs(part):
        product = rates.product(part.tokens, part.config.model.hidden_size, outputs)
        sent = [half, half] if parallel.sequence else [2 * half]
        if part.config.gathers_by_layer:
            waited += count * (half if parallel.sequence else 2 * half)
        else:
            waited += count * sum(max(seconds - product, 0.0) for seconds in sent)
            hidden += count * sum(min(seconds, product) for seconds in sent)
    return waited, hidden


def _column_outputs(part: StageModel) -> list[tuple[int, int]]:
    """Outputs on a rank of the column-parallel layers that share an input, and how often there are such."""
    sizes = part.sizes
    attention, found = sizes["queries"] + 2 * sizes["keys"], []
    for stack, count, *_ in part.stacks:
        found += [(attention, count), (len(stack.block.mlp.inputs) * sizes["ffn"], count)]
        if stack.block.cross_attention is not None:
            found.append((sizes["queries"], count))
    return [*found, (part.answers, int(part.is_last))]


def _pipeline(part: StageModel, cluster: Cluster) -> float:
    """Activations on, gradients back, of each chunk."""
    parallel = part.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    num_borders = sum((not chunk.is_first) + (not chunk.is_last) for chunk in part.chunks)
    stride = parallel.tensor * part.data
    return num_borders * part.border_bytes / cluster.border_bandwidth(parallel.pipeline, stride)


def _shared(part: StageModel, cluster: Cluster) -> float:
    """Stages send the gradients of their copies to the stage that updates the weight, and get it back: the tied head's
    to the first, an embedding's of two stacks."""
    parallel = part.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    table = num_elements(p for p in part.trained if p.is_shared)
    link = cluster.border_bandwidth(parallel.pipeline, parallel.tensor * part.data)
    if parallel.engine == "fsdp2":  # of each data rank its rows, in fp32
        return 8 * table / part.data / link
    return (4 + part.element_bytes) * table / link


def _update(part: StageModel, cluster: Cluster) -> float:
    is_shared = part.config.parallel.zero_stage > 0 or part.config.parallel.engine == "fsdp2"
    mine = num_elements(part.trained) / (part.data if is_shared else 1)
    optimizer = part.config.optimizer
    update_bytes = _UPDATE_BYTES + (0 if optimizer.ema_decay is None else _AVERAGE_BYTES)
    update_bytes += _SCALE_BYTES if optimizer.scale_parameter else 0
    if part.config.parallel.offload == "none":
        return update_bytes * mine / cluster.device.bytes_per_second
    moved = (4 + part.element_bytes) * mine  # gradients down, weights up
    return (moved + update_bytes * mine) / HOST_BYTES_PER_SECOND


def _border(part: StageModel) -> int:
    """Bytes of one [B, T, hidden] tensor, whole."""
    return part.tokens * part.config.model.hidden_size * part.element_bytes

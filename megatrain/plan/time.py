"""How long a step takes: an estimate, by a model that is simple enough to check by hand.

A rank computes at ``efficiency`` times the peak of its device; that share is assumed, or measured (the `mfu` of a short
run on one device), everything else follows from the config:

- Operations are those of `flops_per_token`, and what recomputation repeats, of this rank's part of each layer.
- A message takes its bytes over the bandwidth of the link that its group's ring must pass, without latency. Those of
  tensor parallelism, and the data ranks' (gradients, weights), are not hidden behind arithmetic. Bytes are those of
  docs/parallelism.md, where they were measured: DeepSpeed's, not only the papers'.
- 1F1B: the micro-batches go through the slowest stage one after the other, and once through all stages
  (Narayanan et al. 2021, arXiv:2104.04473).
- The update reads and writes this rank's share of the state once, at the memory's bandwidth.

What is left out: the latency of messages and kernels (small models are slower than this says), waiting for data,
evaluation and logging.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import RunConfig
from megatrain.plan.cluster import Cluster
from megatrain.plan.deepspeed_memory import bucket_setting, uses_bf16_optimizer
from megatrain.plan.flops import flops_per_token
from megatrain.plan.stage_model import StageModel, share

HOST_BYTES_PER_SECOND = 25e9
"""Between a device and its share of the node's CPU memory, and within that: what PCIe of generation 4 reaches."""
_UPDATE_BYTES = 30  # a parameter: gradient, master weight and both means read, the last three and the weight written


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go into, of the slowest rank."""

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    update: float

    @property
    def step(self) -> float:
        return self.compute + self.tensor + self.pipeline + self.bubble + self.data + self.update


def step_time(parts: list[StageModel], cluster: Cluster) -> StepTime:
    count = parts[0].num_micro_batches
    passes = [_Pass.of(part, cluster) for part in parts]
    slowest = max(passes, key=lambda each: each.seconds)
    last = max(range(len(parts)), key=lambda k: _data(parts[k], cluster) + _update(parts[k], cluster))
    return StepTime(
        compute=count * slowest.compute,
        tensor=count * slowest.tensor,
        pipeline=count * slowest.pipeline,
        bubble=sum(each.seconds for each in passes) - slowest.seconds,
        data=_data(parts[last], cluster),
        update=_update(parts[last], cluster),
    )


def pipeline_bubble(config: RunConfig, num_micro_batches: int) -> float:
    """The idle share of 1F1B's time where all stages are alike: (p - 1) / (m + p - 1)."""
    stages = config.parallel.pipeline
    return (stages - 1) / (num_micro_batches + stages - 1)


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch, forward and backward, on a rank."""

    compute: float
    tensor: float
    pipeline: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.pipeline

    @classmethod
    def of(cls, part: StageModel, cluster: Cluster) -> _Pass:
        precision = part.config.train.precision
        rate = cluster.device.peak_flops(precision) * cluster.efficiency
        return cls(_operations(part) / rate, _tensor(part, cluster), _pipeline(part, cluster))


def _operations(part: StageModel) -> float:
    """FLOPs of one micro-batch on a rank, with those that recomputation repeats."""
    model, parallel, seq_len = part.config.model, part.config.parallel, part.config.data.seq_len
    head = 6 * model.hidden_size * (model.vocab_size or 0)
    layer = (flops_per_token(model, seq_len) - head) / model.num_hidden_layers
    attention = 4 * model.num_attention_heads * model.head_size * seq_len  # forward
    layers = part.num_layers * layer
    if parallel.recompute == "full":
        layers += _num_recomputed(part) * layer / 3
    elif parallel.recompute == "selective":
        layers += part.num_layers * attention
    return part.tokens * (layers + part.is_last * head) / parallel.tensor


def _tensor(part: StageModel, cluster: Cluster) -> float:
    """Four all-reduces of a [B, T, hidden] tensor a layer (Megatron-LM), each of two halves: a scatter and a gather.

    Sequence parallelism sends the halves by themselves, and a third one where a layer is computed again.
    """
    size, sequence = part.config.parallel.tensor, part.config.parallel.sequence
    if size == 1:
        return 0.0
    num_halves = 8 * part.num_layers + 2 * (_num_recomputed(part) + part.is_first + part.is_last)
    num_halves += (_num_recomputed(part) + part.is_first) * sequence
    num_bytes = num_halves * _border(part) + 2 * 12 * part.tokens * part.is_last  # the loss: three numbers a token
    return num_bytes * (size - 1) / size / cluster.bandwidth(size, 1)


def _pipeline(part: StageModel, cluster: Cluster) -> float:
    """Activations on, gradients back; of each 1/tensor a rank, gathered on arrival and once more for what was sent."""
    parallel = part.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    num_borders = (not part.is_first) + (not part.is_last)
    stride = parallel.tensor * part.data
    sent = num_borders * _border(part) / parallel.tensor / cluster.border_bandwidth(parallel.pipeline, stride)
    gathered = 0.0 if parallel.sequence else 2 * num_borders * _border(part) * (parallel.tensor - 1) / parallel.tensor
    return sent + gathered / cluster.bandwidth(parallel.tensor, 1)


def _data(part: StageModel, cluster: Cluster) -> float:
    """What data ranks send in a step: gradients in fp32, weights in their own type."""
    data, stage = part.data, part.config.parallel.zero_stage
    gradients, weights = 4 * part.num_parameters, part.element_bytes * part.num_parameters
    if stage == 0:
        sent = 2 * gradients
    elif stage == 1:  # DeepSpeed's BF16_Optimizer all-reduces gradients
        sent = (2 if uses_bf16_optimizer(part.config) else 1) * gradients + weights
    elif stage == 2:
        sent = gradients * part.num_micro_batches + weights
    else:  # weights that may stay whole until the backward pass are gathered once
        stay = part.num_parameters <= bucket_setting(part, "stage3_max_live_parameters")
        sent = (gradients + (1 if stay else 2) * weights) * part.num_micro_batches
    between = sent * (data - 1) / data / cluster.bandwidth(data, part.config.parallel.tensor)
    return between + _tied(part, cluster)


def _tied(part: StageModel, cluster: Cluster) -> float:
    """First and last stage sum the gradients of the table that they share, and the first sends its weights."""
    model, parallel = part.config.model, part.config.parallel
    if parallel.pipeline == 1 or not model.tie_word_embeddings or not (part.is_first or part.is_last):
        return 0.0
    table = part.sizes["vocab"] * model.hidden_size
    link = cluster.border_bandwidth(parallel.pipeline, parallel.tensor * part.data)
    return (4 + part.element_bytes) * table / link


def _update(part: StageModel, cluster: Cluster) -> float:
    mine = part.num_parameters / (part.data if part.config.parallel.zero_stage else 1)
    if part.config.parallel.offload == "none":
        return _UPDATE_BYTES * mine / cluster.device.bytes_per_second
    moved = (4 + part.element_bytes) * mine  # gradients down, weights up
    return (moved + _UPDATE_BYTES * mine) / HOST_BYTES_PER_SECOND


def _border(part: StageModel) -> int:
    """Bytes of one [B, T, hidden] tensor, whole."""
    return part.tokens * part.config.model.hidden_size * part.element_bytes


def _num_recomputed(part: StageModel) -> int:
    """Layers whose forward pass is made twice."""
    parallel = part.config.parallel
    return share(part.num_layers, parallel.recompute_every) if parallel.recompute == "full" else 0

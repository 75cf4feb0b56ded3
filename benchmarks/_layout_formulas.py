"""What a layout should cost a rank, by the formulas of the papers, in this project's types and for its llama layers.

Sources, by row:

- Parameters, gradients, optimizer state: ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). Its mixed precision is
  2 + 2 + 12 bytes a parameter; here gradients are summed in fp32, so 2 + 4 + 12 in bf16, and 4 + 4 + 8 in fp32.
  FSDP2's parameters are its master weights: 4 of the 12 bytes are counted there, stage 0 is as stage 1, and in stage 3
  no weights in bf16 are kept.
- Tensor-parallel messages: Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053). Four all-reduces of b s h a layer and
  micro-batch, one for the embedding, one for the head's gradient, and three fp32 numbers a token for the loss.
- Sequence parallelism, activations: Korthikanti et al. 2022 (arXiv:2205.05198), whose layer keeps
  s b h (34 + 5 a s / h) bytes. That has biases, GELU and dropout. A llama layer in e bytes an element, with query width
  q, key-value width k and MLP width f, keeps, for N = b s tokens, causal attention in blocks of r = 128 rows, and no
  dropout:

      N e (4 h + 2 q + 2 k + 4 f) + 8 N + e a b s^2 (1 + r / s) / 2

  4 h: the inputs of two norms and of two groups of column-parallel layers; 2 q + 2 k: query, key, value and attention's
  output; 4 f: gate, silu(gate), up, and their product; 8 N: the norms' fp32 scales; the rest: probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import RunConfig
from megatrain.distributed.topology import Topology
from megatrain.model.blockwise_attention import BLOCK_ROWS
from megatrain.plan.pipeline_schedule import most_held
from megatrain.plan.stages import stage_layers


def all_reduce(num_bytes: float, size: int) -> float:
    """Bytes a rank sends for the all-reduce of ``num_bytes`` by a ring of ``size`` ranks."""
    return 2 * scatter(num_bytes, size)


def scatter(num_bytes: float, size: int) -> float:
    """The same for a reduce-scatter, and for the all-gather of shards that are ``num_bytes`` together."""
    return num_bytes * (size - 1) / size


@dataclass(frozen=True)
class StageModel:
    """The part of a model that a rank of pipeline stage ``stage`` computes."""

    config: RunConfig
    mesh: Topology
    stage: int

    @property
    def zero_stage(self) -> int:
        """What data ranks share; FSDP2 has no stage that shares nothing."""
        return max(self.config.parallel.zero_stage, 1 if self.config.parallel.engine == "fsdp2" else 0)

    @property
    def chunk_layers(self) -> list[int]:
        """Decoder layers of each of its virtual stages."""
        return [len(layers) for (layers,) in stage_layers(self.config)[self.stage :: self.mesh.pipeline]]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the stage."""
        return sum(self.chunk_layers)

    @property
    def tied_copy(self) -> float:
        """Parameters that the last stage has a copy of, which the first stage updates."""
        model = self.config.model
        is_copy = model.tie_word_embeddings and self.is_last and not self.is_first
        return self.widths[3] * model.hidden_size if is_copy else 0.0

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.stage == self.mesh.pipeline - 1

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return 4 if self.config.train.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.config.train.micro_batch_size * self.config.data.seq_len

    @property
    def num_micro_batches(self) -> int:
        """Of a step."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.mesh.data)

    @property
    def activation_bytes(self) -> int:
        """Of one [B, T, hidden] tensor, whole."""
        return self.tokens * self.config.model.hidden_size * self.element_bytes

    @property
    def widths(self) -> tuple[float, float, float, float]:
        """Of queries, keys, MLP and vocabulary, on one tensor rank."""
        model, size = self.config.model, self.mesh.tensor
        keys = max(model.kv_heads / size, 1) * model.head_size
        queries = model.num_attention_heads * model.head_size / size
        return queries, keys, model.ffn_size / size, (model.vocab_size or 0) / size

    @property
    def num_parameters(self) -> float:
        """That this rank computes with."""
        hidden = self.config.model.hidden_size
        queries, keys, ffn, vocab = self.widths
        layers = self.num_layers * (hidden * (2 * queries + 2 * keys + 3 * ffn) + 2 * hidden)
        num_tables = self.is_first + self.is_last
        if self.config.model.tie_word_embeddings and self.mesh.pipeline == 1:
            num_tables = 1
        return layers + num_tables * vocab * hidden + self.is_last * hidden

    @property
    def largest_layer(self) -> float:
        """Parameters of its largest layer: a decoder layer, or the embedding."""
        hidden = self.config.model.hidden_size
        queries, keys, ffn, vocab = self.widths
        return max(hidden * (2 * queries + 2 * keys + 3 * ffn) + 2 * hidden, vocab * hidden)


def memory(part: StageModel) -> dict[str, float]:
    """Bytes of each kind that a rank holds."""
    size, stage, data = part.num_parameters, part.zero_stage, part.mesh.data
    is_fsdp2 = part.config.parallel.engine == "fsdp2"
    optimizer = 8 if is_fsdp2 or part.config.train.precision == "fp32" else 12
    beside = 0.0 if is_fsdp2 else part.tied_copy  # a sum that DeepSpeed knows nothing of
    masters = 4 * size / data if is_fsdp2 else 0.0
    kept = 0.0 if is_fsdp2 and stage >= 3 else part.element_bytes * size / (data if stage >= 3 else 1)
    held = {
        "parameters": masters + kept,
        "gradients": 4 * (size - beside) / (data if stage >= 2 else 1) + 4 * beside,
        "optimizer": optimizer * (size - part.tied_copy) / (data if stage >= 1 else 1),
        "buffers": 0.0,
        "activations": _activations(part),
    }
    if stage == 3:  # what the passes have gathered at one time: a layer
        held["whole parameters"] = masters + part.element_bytes * part.largest_layer
    return held


def sent(part: StageModel) -> dict[str, float]:
    """Bytes that a rank sends in a step, by kind of collective."""
    total: dict[str, float] = {}
    for messages in (_data(part), _tensor(part), _pipeline(part)):
        for kind, num_bytes in messages.items():
            total[kind] = total.get(kind, 0.0) + num_bytes
    return total


def _activations(part: StageModel) -> float:
    hidden, bytes_, tokens, tensor = part.config.model.hidden_size, part.element_bytes, part.tokens, part.mesh.tensor
    parallel = part.config.parallel
    queries, keys, ffn, vocab = part.widths
    shared = tensor if parallel.sequence else 1  # between blocks
    seq_len = part.config.data.seq_len
    heads = part.config.model.num_attention_heads / tensor
    attention = bytes_ * heads * tokens * seq_len * (1 + BLOCK_ROWS / seq_len) / 2
    outside = 4 * hidden * tokens * bytes_ / shared + 8 * tokens / shared
    layer = outside + tokens * bytes_ * (2 * queries + 2 * keys + 4 * ffn) + attention
    if parallel.recompute == "selective":
        layer = outside + tokens * bytes_ * (2 * queries + 2 * keys + 3 * ffn)
    rotary = tokens * part.config.model.head_size * bytes_
    chunks = []
    for num_layers in part.chunk_layers:
        num_recomputed = -(-num_layers // parallel.recompute_every) if parallel.recompute == "full" else 0
        layers = num_recomputed * hidden * tokens * bytes_ / shared + (num_layers - num_recomputed) * layer
        chunks.append(layers + rotary)
    if part.is_first:
        chunks[0] += 8 * tokens  # the token ids
    if part.is_last:
        chunks[-1] += tokens * bytes_ * (2 * hidden / shared + vocab) + 4 * tokens / shared
    return most_held(part.mesh.pipeline, len(chunks), part.num_micro_batches, part.stage, chunks)


def _data(part: StageModel) -> dict[str, float]:
    """ZeRO, section 7: 2 psi elements for stages 0 to 2, 3 psi for stage 3; gradients in fp32.

    FSDP2 has rows of the tied copy as well; under DeepSpeed it is none of its parameters.
    """
    data, stage = part.mesh.data, part.zero_stage
    size = part.num_parameters - (0.0 if part.config.parallel.engine == "fsdp2" else part.tied_copy)
    gradients, weights = 4 * size, part.element_bytes * size
    times = part.num_micro_batches if stage >= 2 else 1  # partitioned gradients cannot wait for the last one
    if stage == 0:
        return {"all-reduce": all_reduce(gradients, data)}
    gathers = 2 * times if stage == 3 else 1
    return {"reduce-scatter": times * scatter(gradients, data), "all-gather": gathers * scatter(weights, data)}


def _tensor(part: StageModel) -> dict[str, float]:
    size, x, times = part.mesh.tensor, part.activation_bytes, part.num_micro_batches
    layers, ends = part.num_layers, part.is_first + part.is_last
    recomputed = -(-layers // part.config.parallel.recompute_every) if part.config.parallel.recompute == "full" else 0
    loss = all_reduce(12 * part.tokens, size) if part.is_last else 0.0
    if not part.config.parallel.sequence:
        # Recomputation stops where the last saved tensor is, before the MLP's all-reduce.
        num_sums = 4 * layers + recomputed + ends
        return {"all-reduce": times * (num_sums * all_reduce(x, size) + loss)}
    return {
        "all-reduce": times * (part.is_first * all_reduce(x, size) + loss),
        # Inputs of column-parallel layers are gathered again: two a layer, and the head's.
        "all-gather": times * (6 * layers + 2 * recomputed + ends + part.is_last) * scatter(x, size),
        "reduce-scatter": times * (4 * layers + recomputed + part.is_last) * scatter(x, size),
    }


def _pipeline(part: StageModel) -> dict[str, float]:
    """A [B, T, hidden] tensor on to the next virtual stage, its gradient back, on each tensor rank; of a sequence that
    is cut a rank's part. The last stage's gradient of a tied table goes to the first, its weights come back."""
    if part.mesh.pipeline == 1:
        return {}
    num_borders = 2 * len(part.chunk_layers) - part.is_first - part.is_last
    size = part.mesh.tensor if part.config.parallel.sequence else 1
    messages = {"point-to-point": part.num_micro_batches * num_borders * part.activation_bytes / size}
    if not part.config.model.tie_word_embeddings or not (part.is_first or part.is_last):
        return messages
    table, bytes_ = part.widths[3] * part.config.model.hidden_size, part.element_bytes
    if part.config.parallel.engine == "fsdp2":  # of each data rank its rows, in fp32
        table, bytes_ = table / part.mesh.data, 4
    return {**messages, **({"broadcast": bytes_ * table} if part.is_first else {"reduce-scatter": 4 * table})}

"""What a forward pass keeps for the backward pass, in bytes, and what the backward pass needs beside it.

The counts are those of this project's layers (docs/parallelism.md, "Recomputation"), in the manner of Korthikanti et
al. 2022 (arXiv:2205.05198). benchmarks/layouts.py measures them on CPUs.
"""

from __future__ import annotations

from megatrain.plan.stage_model import StageModel, share

_BLOCK_ROWS = 128  # of attention written out: megatrain.model.blockwise_attention
_SOFTMAX_BYTES = 256 << 20  # fp32 work space of the loss on a GPU: megatrain.model.loss
_VOCAB_PARALLEL_SOFTMAX_BYTES = 16 << 20  # the same where the vocabulary is cut: megatrain.parallel.vocab


def activations(part: StageModel, *, on_cpu: bool = False) -> int:
    """Kept at the most, for all micro-batches in flight. On a GPU attention is fused, on a CPU it is written out."""
    parallel, tokens, bytes_ = part.config.parallel, part.tokens, part.element_bytes
    model = part.config.model
    fused = is_fused(part) and not on_cpu
    num_recomputed = share(part.num_layers, parallel.recompute_every) if parallel.recompute == "full" else 0
    kept = num_recomputed * _border_elements(part) * bytes_
    kept += (part.num_layers - num_recomputed) * _layer(part, fused, parallel.recompute == "selective")
    if model.family != "gpt2":
        kept += tokens * model.head_size * bytes_  # cosines and sines
    if part.is_first:
        kept += 8 * tokens * (2 if model.family == "gpt2" else 1)  # ids, and places
        kept += tokens * model.hidden_size if model.hidden_dropout else 0
    if part.is_last:  # the final norm's input, the head's, and the gradient of the logits
        elements = _border_elements(part) + tokens * (model.hidden_size + part.widths.vocab)
        kept += elements * bytes_ + 4 * _shared(part)
    return part.in_flight * kept


def working_set(part: StageModel) -> dict[str, int]:
    """What the backward pass holds for a moment, of its largest step: an estimate of the gradients of activations."""
    model, tokens, bytes_ = part.config.model, part.tokens, part.element_bytes
    wide = (2 if model.family == "gpt2" else 3) * part.widths.ffn
    held = {"gradients of activations": tokens * bytes_ * (2 * model.hidden_size + wide)}
    if part.config.parallel.recompute == "full":
        held["a recomputed layer"] = _layer(part, is_fused(part), False)
    elif part.config.parallel.recompute == "selective" and not is_fused(part):
        held["a recomputed attention"] = _probabilities(part)
    if part.is_last:
        workspace = _SOFTMAX_BYTES if part.config.parallel.tensor == 1 else _VOCAB_PARALLEL_SOFTMAX_BYTES
        held["softmax in fp32"] = min(workspace, 4 * tokens * part.widths.vocab)
    return held


def is_fused(part: StageModel) -> bool:
    """Whether a GPU keeps no attention probabilities: in half precision, without dropout of them.

    In fp32 it depends on the heads and the mask; they are counted then.
    """
    return part.config.train.precision != "fp32" and part.config.model.attention_dropout == 0.0


def _layer(part: StageModel, fused: bool, selective: bool) -> int:
    """Bytes that a decoder layer keeps of one micro-batch."""
    model, tokens, widths = part.config.model, part.tokens, part.widths
    hidden, queries, keys, ffn = model.hidden_size, widths.queries, widths.keys, widths.ffn
    wide = 2 * hidden  # the inputs of two groups of column-parallel layers; gathered where the sequence is cut
    if model.family == "gpt2":
        wide += 4 * queries + 2 * ffn  # queries, keys, values, attention's output; before and after the activation
        wide += 0 if fused or selective else 2 * queries  # keys and values, laid out by heads
        norm_bytes = 16
    else:
        wide += 2 * queries + 2 * keys + (3 if selective else 4) * ffn
        wide += queries + keys if model.family == "qwen3" else 0
        norm_bytes = 8
    kept = part.element_bytes * (tokens * wide + 2 * _border_elements(part)) + norm_bytes * _shared(part)
    if model.family == "qwen3":
        kept += 4 * tokens * (queries + keys) // model.head_size
    if model.hidden_dropout:
        kept += 2 * _border_elements(part)  # masks, a byte each
    if selective:
        return kept
    return kept + (4 * tokens * queries // model.head_size if fused else _probabilities(part))


def _probabilities(part: StageModel) -> int:
    """Bytes of causal attention's probabilities, in blocks of rows."""
    seq_len = part.config.data.seq_len
    num_blocks = share(seq_len, _BLOCK_ROWS)
    columns = sum(
        min((k + 1) * _BLOCK_ROWS, seq_len) * min(_BLOCK_ROWS, seq_len - k * _BLOCK_ROWS) for k in range(num_blocks)
    )
    heads = part.widths.queries // part.config.model.head_size
    return part.element_bytes * heads * part.config.train.micro_batch_size * columns


def _border_elements(part: StageModel) -> int:
    """Elements of the residual stream on this rank."""
    return _shared(part) * part.config.model.hidden_size


def _shared(part: StageModel) -> int:
    """Tokens between blocks on this rank: sequence parallelism shares them out."""
    return part.tokens // (part.config.parallel.tensor if part.config.parallel.sequence else 1)

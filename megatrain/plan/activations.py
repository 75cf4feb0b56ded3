"""What a forward pass keeps for the backward pass, in bytes, and what the backward pass needs beside it.

The counts are those of this project's layers (docs/parallelism.md, "Recomputation"), in the manner of Korthikanti et
al. 2022 (arXiv:2205.05198). benchmarks/layouts.py measures them on CPUs.
"""

from __future__ import annotations

from megatrain.families.description import Attention, Mlp
from megatrain.plan.stage_model import Chunk, StageModel, share

_BLOCK_ROWS = 128  # of attention written out: megatrain.model.blockwise_attention
_SOFTMAX_BYTES = 256 << 20  # fp32 work space of the loss on a GPU: megatrain.model.loss
_VOCAB_PARALLEL_SOFTMAX_BYTES = 16 << 20  # the same where the vocabulary is cut: megatrain.parallel.vocab


def activations(stage: StageModel, *, on_cpu: bool = False) -> int:
    """Kept at the most, for all micro-batches in flight. On a GPU attention is fused, on a CPU it is written out."""
    fused = is_fused(stage) and not on_cpu
    return stage.most_held([_chunk(stage, chunk, fused) for chunk in stage.chunks])


def working_set(stage: StageModel) -> dict[str, int]:
    """What the backward pass holds for a moment, of its largest step: an estimate of the gradients of activations."""
    model, tokens, bytes_ = stage.config.model, stage.tokens, stage.element_bytes
    wide = (len(model.description.block.mlp.inputs) + 1) * stage.sizes["ffn"]
    held = {"gradients of activations": tokens * bytes_ * (2 * model.hidden_size + wide)}
    if stage.config.parallel.recompute == "full":
        held["a recomputed layer"] = _layer(stage, is_fused(stage), False)
    elif stage.config.parallel.recompute == "selective" and not is_fused(stage):
        held["a recomputed attention"] = _probabilities(stage)
    if stage.is_last:
        workspace = _SOFTMAX_BYTES if stage.config.parallel.tensor == 1 else _VOCAB_PARALLEL_SOFTMAX_BYTES
        held["softmax in fp32"] = min(workspace, 4 * tokens * stage.sizes["vocab"])
    return held


def is_fused(stage: StageModel) -> bool:
    """Whether a GPU keeps no attention probabilities: in half precision, without dropout of them.

    In fp32 it depends on the heads and the mask; they are counted then.
    """
    return stage.config.train.precision != "fp32" and stage.config.model.attention_dropout == 0.0


def _chunk(stage: StageModel, chunk: Chunk, fused: bool) -> int:
    """Bytes that a virtual stage keeps of one micro-batch."""
    parallel, tokens, bytes_ = stage.config.parallel, stage.tokens, stage.element_bytes
    model, family = stage.config.model, stage.config.model.description
    num_recomputed = share(chunk.num_layers, parallel.recompute_every) if parallel.recompute == "full" else 0
    kept = num_recomputed * _border_elements(stage) * bytes_
    kept += (chunk.num_layers - num_recomputed) * _layer(stage, fused, parallel.recompute == "selective")
    if family.block.attention.rotates:
        kept += tokens * model.head_size * bytes_  # cosines and sines
    if chunk.is_first:
        kept += 8 * tokens * len(family.embeddings)  # ids of tokens and positions
        kept += tokens * model.hidden_size if model.hidden_dropout else 0
    if chunk.is_last:  # the final norm's input, the head's, and the gradient of the logits
        elements = 2 * _border_elements(stage) + tokens * stage.sizes["vocab"]
        kept += elements * bytes_ + family.norm.saved_bytes * _tokens_between_blocks(stage)
    return kept


def _layer(stage: StageModel, fused: bool, selective: bool) -> int:
    """Bytes that a decoder layer keeps of one micro-batch."""
    model, tokens, block = stage.config.model, stage.tokens, stage.config.model.description.block
    # The inputs of attention and MLP are gathered again in the backward pass, where the layout can.
    num_border, num_whole = (2, 2) if stage.config.gathers_by_layer else (4, 0)
    wide = num_whole * model.hidden_size
    wide += _attention_elements(stage, block.attention, fused or selective) + _mlp_elements(stage, block.mlp, selective)
    kept = stage.element_bytes * (tokens * wide + num_border * _border_elements(stage))
    kept += (block.attention_norm.saved_bytes + block.mlp_norm.saved_bytes) * _tokens_between_blocks(stage)
    if block.attention.head_norms:  # a statistic of each head
        num_heads = (stage.sizes["queries"] + stage.sizes["keys"]) // model.head_size
        kept += block.attention.head_norms[0].saved_bytes * tokens * num_heads
    if model.hidden_dropout:
        kept += 2 * _border_elements(stage)  # masks, a byte each
    if selective:
        return kept
    return kept + (4 * tokens * stage.sizes["queries"] // model.head_size if fused else _probabilities(stage))


def _attention_elements(stage: StageModel, attention: Attention, keeps_no_copies: bool) -> int:
    """Elements a token that attention keeps beside its input and its probabilities."""
    queries, keys = stage.sizes["queries"], stage.sizes["keys"]
    elements = 2 * queries + 2 * keys  # queries, keys, values, and the output
    if attention.head_norms:
        elements += queries + keys  # before the norms
    if attention.is_fused and not keeps_no_copies:
        elements += 2 * keys  # keys and values laid out by heads, beside the product that the queries are a view of
    return elements


def _mlp_elements(stage: StageModel, mlp: Mlp, selective: bool) -> int:
    """Elements a token that the MLP keeps beside its input: before and after the activation, and a gate in between."""
    between = 1 if mlp.is_gated and not selective else 0
    return (len(mlp.inputs) + between + 1) * stage.sizes["ffn"]


def _probabilities(stage: StageModel) -> int:
    """Bytes of causal attention's probabilities, in blocks of rows: from the first key that a block sees to its end."""
    seq_len = stage.config.data.seq_len
    window = stage.config.model.attention_window or seq_len
    elements = 0
    for start in range(0, seq_len, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, seq_len)
        elements += (end - start) * (end - max(start - window + 1, 0))
    heads = stage.sizes["queries"] // stage.config.model.head_size
    return stage.element_bytes * heads * stage.config.train.micro_batch_size * elements


def _border_elements(stage: StageModel) -> int:
    """Elements of the residual stream on this rank."""
    return _tokens_between_blocks(stage) * stage.config.model.hidden_size


def _tokens_between_blocks(stage: StageModel) -> int:
    """Of a micro-batch on this rank: sequence parallelism shares them out."""
    return stage.tokens // (stage.config.parallel.tensor if stage.config.parallel.sequence else 1)

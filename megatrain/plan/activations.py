"""What a forward pass keeps for the backward pass, in bytes, and what the backward pass needs beside it.

The counts are those of this project's layers (docs/parallelism.md, "Recomputation"), in the manner of Korthikanti et
al. 2022 (arXiv:2205.05198). benchmarks/layouts.py measures them on CPUs.
"""

from __future__ import annotations

from megatrain.families.description import HeadTransform
from megatrain.plan.layer_activations import Stream, layer_bytes, probabilities_bytes, streams
from megatrain.plan.stage_model import Chunk, StageModel, share

_ID_BYTES = 8
LARGEST_SOFTMAX_BYTES = 256 << 20
"""fp32 work space of the loss on a GPU (megatrain.fp32); less where the GPU has under 64 GiB."""


def activations(stage: StageModel, *, on_cpu: bool = False) -> int:
    """Kept at the most, for all micro-batches in flight. On a GPU attention is fused, on a CPU it is written out."""
    fused = is_fused(stage) and not on_cpu
    return stage.most_held([_chunk(stage, chunk, fused) for chunk in stage.chunks])


def working_set(stage: StageModel) -> dict[str, int]:
    """What the backward pass holds for a moment, of its largest step: an estimate of the gradients of activations."""
    model, tokens, bytes_ = stage.config.model, stage.tokens, stage.element_bytes
    wide = (len(model.description.block.mlp.inputs) + 1) * stage.sizes["ffn"]
    held_streams = [each for each, part in zip(streams(stage), stage.stacks, strict=True) if part.num_layers]
    held = {"gradients of activations": tokens * bytes_ * (2 * model.hidden_size + wide)}
    if stage.config.parallel.recompute == "full":
        held["a recomputed layer"] = max(layer_bytes(stream, is_fused(stage), False) for stream in held_streams)
    elif stage.config.parallel.recompute == "selective" and not is_fused(stage):
        held["a recomputed attention"] = max(map(probabilities_bytes, held_streams))
    if stage.is_last:
        held["softmax in fp32"] = min(LARGEST_SOFTMAX_BYTES, 4 * stage.targets * stage.answers)
    return held


def is_fused(stage: StageModel) -> bool:
    """Whether a GPU keeps no attention probabilities: in half precision, without dropout of them.

    In fp32 it depends on the heads and the mask; they are counted then.
    """
    return stage.config.train.precision != "fp32" and stage.config.model.attention_dropout == 0.0


def _chunk(stage: StageModel, chunk: Chunk, fused: bool) -> int:
    """Bytes that a virtual stage keeps of one micro-batch."""
    held = [(stream, numbers) for stream, numbers in zip(streams(stage), chunk.layers, strict=True) if numbers]
    kept = sum(_stack(stream, numbers, fused) for stream, numbers in held)
    if chunk.is_last:
        kept += _before_loss(held[-1][0])
    return kept


def _stack(stream: Stream, numbers: range, fused: bool) -> int:
    """What these layers of a stack keep, and what stands before its first and behind its last one."""
    stage, attention = stream.stage, stream.stack.block.attention
    model, parallel, bytes_ = stage.config.model, stage.config.parallel, stage.element_bytes
    num_recomputed = share(len(numbers), parallel.recompute_every) if parallel.recompute == "full" else 0
    kept = num_recomputed * stream.between * bytes_
    kept += (len(numbers) - num_recomputed) * layer_bytes(stream, fused, parallel.recompute == "selective")
    if attention.rotates:
        kept += stream.tokens * model.head_size * bytes_  # cosines and sines
    if attention.relative_bias is not None:
        kept += _relative_bias(stream, is_kept=fused or parallel.recompute != "none")
    if 0 in numbers:
        kept += _before_layers(stream)
    is_encoder = stream.stack != model.description.decoder
    if is_encoder and stream.stack.norm is not None and model.num_layers(stream.stack) - 1 in numbers:
        kept += bytes_ * stream.between + stream.stack.norm.saved_bytes * stream.tokens_between
    if stream.source_len:  # what the encoder gave, whole, and who sees what of it
        source = stage.config.train.micro_batch_size * stream.source_len
        kept += bytes_ * source * model.hidden_size + (
            bytes_ * stream.pairs(stream.source_len) if _has_ids(stage) else 0
        )
    return kept


def _before_layers(stream: Stream) -> int:
    """Bytes that the embeddings keep."""
    stage, tokens, bytes_ = stream.stage, stream.tokens, stream.stage.element_bytes
    model = stage.config.model
    if stage.config.lora is not None:
        return 0 if stage.config.parallel.recompute == "full" else -_before_gradients(stream)
    if model.description.reads_images:
        patches = stage.config.train.micro_batch_size * (stage.sizes["places"] - 1)
        kept = patches * stage.sizes["channels"] * stage.sizes["patch"] ** 2 * bytes_  # pixels
    else:
        kept = _ID_BYTES * tokens * sum(bool(e.weights) for e in stream.stack.embeddings)  # ids of tokens, positions
    if (norm := stream.stack.embedding_norm) is not None:
        kept += tokens * (model.hidden_size * bytes_ + norm.saved_bytes)
    return kept + (tokens * model.hidden_size if model.hidden_dropout else 0)


def _relative_bias(stream: Stream, *, is_kept: bool) -> int:
    """Bytes of a stack's bias: the range of each distance, what is not seen, and where it ``is_kept``, itself: written
    out, attention only adds it."""
    stage, num_samples = stream.stage, stream.stage.config.train.micro_batch_size if _has_ids(stream.stage) else 1
    pairs = stream.seq_len**2
    kept = _ID_BYTES * pairs if stage.config.lora is None else 0
    if stream.stack.block.attention.is_causal or _has_ids(stage):
        kept += num_samples * pairs
    return kept + (stage.element_bytes * stream.heads * num_samples * pairs if is_kept else 0)


def _has_ids(stage: StageModel) -> bool:
    """Whether several pairs share a sample, and do not see each other."""
    return stage.config.objective.of(stage.config.model) == "sequence_to_sequence"


def _before_loss(stream: Stream) -> int:
    """Bytes that the layers behind the blocks keep: what the head reads, and the gradient of the logits."""
    stage = stream.stage
    model, bytes_, family = stage.config.model, stage.element_bytes, stage.config.model.description
    kept = 0
    if family.norm is not None:
        kept += bytes_ * stream.between + family.norm.saved_bytes * stream.tokens_between
    if (transform := family.head_transform) is not None:
        kept += stage.targets * (_transformed(transform, bytes_, model.hidden_dropout > 0.0) * model.hidden_size)
        kept += stage.targets * (transform.norm.saved_bytes if transform.norm else 0)
    read = stage.targets * model.hidden_size if family.asks_at_places else stream.between
    return kept + bytes_ * (read + stage.targets * stage.answers)


def _transformed(transform: HeadTransform, bytes_: int, has_dropout: bool) -> int:
    """Bytes a channel that what stands before the head keeps, beside what the head reads of it: inputs of the product,
    of the activation and of the norm. tanh keeps what it gives, dropout a mask."""
    if transform.norm is not None:
        return 3 * bytes_
    return bytes_ + (bytes_ + 1 if transform.drops and has_dropout else 0)


def _before_gradients(stream: Stream) -> int:
    """Bytes that the first layer does not keep where the embedding is frozen: its norm, and the masks of dropout in
    front of the adapters, have no gradient to pass on. (What precedes the first adapter in it is counted as kept.)"""
    stage, block = stream.stage, stream.stack.block
    lora, attention = stage.config.lora, block.attention
    assert lora is not None
    num_masks = (
        sum(lora.adapts(f"{attention.name}.{linear.name}") for linear in attention.inputs) if lora.dropout else 0
    )
    norm_bytes = block.attention_norm.saved_bytes * stream.tokens_between
    return norm_bytes + stage.element_bytes * stream.between + num_masks * stream.tokens * stage.sizes["hidden"]

"""What a forward pass keeps for the backward pass, in bytes, and what the backward pass needs beside it.

The counts are those of this project's layers (docs/parallelism.md, "Recomputation"), in the manner of Korthikanti et
al. 2022 (arXiv:2205.05198). benchmarks/layouts.py measures them on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.families.description import Attention, Linear, Mlp
from megatrain.plan.pair_activations import pair_activations
from megatrain.plan.stage_model import Chunk, StageModel, share

_BLOCK_ROWS = 128  # of attention written out: megatrain.model.blockwise_attention
LARGEST_SOFTMAX_BYTES = 256 << 20
"""fp32 work space of the loss on a GPU (megatrain.fp32); less where the GPU has under 64 GiB."""


def activations(stage: StageModel, *, on_cpu: bool = False) -> int:
    """Kept at the most, for all micro-batches in flight. On a GPU attention is fused, on a CPU it is written out."""
    fused = is_fused(stage) and not on_cpu
    if stage.config.model.description.encoder is not None:
        return pair_activations(stage, fused)
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
        held["softmax in fp32"] = min(LARGEST_SOFTMAX_BYTES, 4 * stage.targets * stage.sizes["vocab"])
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
    if chunk.is_first and stage.config.lora is None:
        if family.reads_images:
            patches = stage.config.train.micro_batch_size * (stage.sizes["places"] - 1)
            kept += patches * stage.sizes["channels"] * stage.sizes["patch"] ** 2 * bytes_  # pixels
        else:
            kept += 8 * tokens * len(family.embeddings)  # ids of tokens and positions
        if family.embedding_norm is not None:
            kept += tokens * (model.hidden_size * bytes_ + family.embedding_norm.saved_bytes)
        kept += tokens * model.hidden_size if model.hidden_dropout else 0
    elif chunk.is_first and parallel.recompute != "full":
        kept -= _before_gradients(stage)
    if chunk.is_last:
        kept += _before_loss(stage)
    return kept


def _before_loss(stage: StageModel) -> int:
    """Bytes that the layers behind the blocks keep: what the head reads, and the gradient of the logits."""
    model, bytes_, family = stage.config.model, stage.element_bytes, stage.config.model.description
    kept = 0
    if family.norm is not None:
        kept += bytes_ * _border_elements(stage) + family.norm.saved_bytes * _tokens_between_blocks(stage)
    if (transform := family.head_transform) is not None:  # inputs of the product, of the activation, of the norm
        kept += stage.targets * (3 * bytes_ * model.hidden_size + transform.norm.saved_bytes)
    read = stage.targets * model.hidden_size if family.asks_at_places else _border_elements(stage)
    return kept + bytes_ * (read + stage.targets * stage.sizes["vocab"])


def _before_gradients(stage: StageModel) -> int:
    """Bytes that the first layer does not keep where the embedding is frozen: its norm, and the masks of dropout in
    front of the adapters, have no gradient to pass on. (What precedes the first adapter in it is counted as kept.)"""
    lora, attention = stage.config.lora, stage.config.model.description.block.attention
    assert lora is not None
    num_masks = (
        sum(lora.adapts(f"{attention.name}.{linear.name}") for linear in attention.inputs) if lora.dropout else 0
    )
    norm_bytes = stage.config.model.description.block.attention_norm.saved_bytes * _tokens_between_blocks(stage)
    return norm_bytes + stage.element_bytes * _border_elements(stage) + num_masks * stage.tokens * stage.sizes["hidden"]


def _layer(stage: StageModel, fused: bool, selective: bool) -> int:
    """Bytes that a decoder layer keeps of one micro-batch."""
    model, tokens, block = stage.config.model, stage.tokens, stage.config.model.description.block
    # Of the norms their inputs; what they give is gathered again in the backward pass, where the layout can.
    kept = stage.element_bytes * (2 if stage.config.gathers_by_layer else 4) * _border_elements(stage)
    kept += (block.attention_norm.saved_bytes + block.mlp_norm.saved_bytes) * _tokens_between_blocks(stage)
    of_token = stage.element_bytes * (
        _attention_elements(stage, block.attention, fused or selective) + _mlp_elements(stage, block.mlp, selective)
    )
    of_token += _inputs(stage, block.attention.name, (block.attention.output,), is_kept=fused and not selective)
    of_token += _inputs(stage, block.mlp.name, (block.mlp.output,))
    if stage.config.gathers_by_layer:
        of_token += _inputs(stage, block.attention.name, block.attention.inputs)
        of_token += _inputs(stage, block.mlp.name, block.mlp.inputs)
    kept += tokens * of_token
    if block.attention.head_norms:  # a statistic of each head
        num_heads = (stage.sizes["queries"] + stage.sizes["keys"]) // model.head_size
        kept += block.attention.head_norms[0].saved_bytes * tokens * num_heads
    if model.hidden_dropout:
        kept += 2 * _border_elements(stage)  # masks, a byte each
    if selective:
        return kept
    return kept + (4 * tokens * stage.sizes["queries"] // model.head_size if fused else _probabilities(stage))


def _attention_elements(stage: StageModel, attention: Attention, keeps_no_copies: bool) -> int:
    """Elements a token that attention keeps beside its input, its output and its probabilities."""
    queries, keys = stage.sizes["queries"], stage.sizes["keys"]
    elements = queries + 2 * keys
    if attention.head_norms:
        elements += queries + keys  # before the norms
    if attention.is_fused and not keeps_no_copies:
        elements += 2 * keys  # keys and values laid out by heads, beside the product that the queries are a view of
    return elements


def _mlp_elements(stage: StageModel, mlp: Mlp, selective: bool) -> int:
    """Elements a token that the MLP keeps beside its input and its last product's: before the activation, and a gate
    behind it."""
    between = 1 if mlp.is_gated and not selective else 0
    return (len(mlp.inputs) + between) * stage.sizes["ffn"]


def _inputs(stage: StageModel, block: str, linears: Sequence[Linear], *, is_kept: bool = False) -> int:
    """Bytes a token that products keep of the input that they share, for the gradients of their weights. ``is_kept``:
    another layer keeps it too. A frozen weight needs none, but DeepSpeed's ZeRO 3 keeps it; an adapter keeps what its
    dropout leaves, and the mask."""
    lora, bytes_, width = stage.config.lora, stage.element_bytes, stage.sizes[linears[0].inputs]
    parallel = stage.config.parallel
    is_kept = is_kept or (parallel.engine == "deepspeed" and parallel.zero_stage == 3)
    if lora is None:
        return bytes_ * width
    num_adapted = sum(lora.adapts(f"{block}.{linear.name}") for linear in linears)
    kept = bytes_ * width if is_kept or (num_adapted and not lora.dropout) else 0
    of_adapter = bytes_ * lora.rank + ((bytes_ + 1) * width if lora.dropout else 0)
    return kept + num_adapted * of_adapter


def _probabilities(stage: StageModel) -> int:
    """Bytes of attention's probabilities, in blocks of rows: from the first key that a block sees to its end, or where
    attention is not causal to the last key."""
    seq_len = stage.config.data.seq_len
    window = stage.config.model.attention_window or seq_len
    elements = 0
    for start in range(0, seq_len, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, seq_len)
        last = end if stage.config.model.description.block.attention.is_causal else seq_len
        elements += (end - start) * (last - max(start - window + 1, 0))
    heads = stage.sizes["queries"] // stage.config.model.head_size
    return stage.element_bytes * heads * stage.config.train.micro_batch_size * elements


def _border_elements(stage: StageModel) -> int:
    """Elements of the residual stream on this rank."""
    return _tokens_between_blocks(stage) * stage.config.model.hidden_size


def _tokens_between_blocks(stage: StageModel) -> int:
    """Of a micro-batch on this rank: sequence parallelism shares them out."""
    return stage.tokens // (stage.config.parallel.tensor if stage.config.parallel.sequence else 1)

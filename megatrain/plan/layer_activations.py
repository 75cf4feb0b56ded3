"""What one layer keeps of a micro-batch for the backward pass, in bytes: the counts of `megatrain.plan.activations`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatrain.families.description import Attention, Linear, Mlp, Stack
from megatrain.plan.stage_model import StageModel

_BLOCK_ROWS = 128  # of attention written out: megatrain.model.blockwise_attention


class Stream(NamedTuple):
    """What passes through a stack on a rank: of each sample ``seq_len`` tokens, which attend to one another, and to
    ``source_len`` of an encoder's output."""

    stage: StageModel
    stack: Stack
    seq_len: int
    source_len: int = 0

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.stage.config.train.micro_batch_size * self.seq_len

    @property
    def tokens_between(self) -> int:
        """Of a micro-batch on this rank, between blocks: sequence parallelism shares them out."""
        parallel = self.stage.config.parallel
        return self.tokens // (parallel.tensor if parallel.sequence else 1)

    @property
    def between(self) -> int:
        """Elements of the residual stream on this rank."""
        return self.tokens_between * self.stage.config.model.hidden_size

    @property
    def heads(self) -> int:
        """Query heads on this rank."""
        return self.stage.sizes["queries"] // self.stage.config.model.head_size

    def pairs(self, num_keys: int) -> int:
        """Of a query and a key, in a micro-batch and one head."""
        return self.tokens * num_keys


def streams(stage: StageModel) -> list[Stream]:
    """That of each of the model's stacks."""
    seq_len, target_len = stage.config.data.seq_len, stage.config.target_len
    *encoders, decoder = (held.stack for held in stage.stacks)
    if target_len is None:
        return [Stream(stage, decoder, seq_len)]
    return [*(Stream(stage, encoder, seq_len) for encoder in encoders), Stream(stage, decoder, target_len, seq_len)]


def layer_bytes(stream: Stream, fused: bool, selective: bool) -> int:
    """``fused``: attention keeps no probabilities. ``selective``: its core and the activation are computed again."""
    stage, block, tokens = stream.stage, stream.stack.block, stream.tokens
    bytes_, gathers = stage.element_bytes, stage.config.gathers_by_layer
    kept = of_token = 0
    for norm, part in block.branches.values():
        # Of the norm its input; what it gives is gathered again in the backward pass, where the layout can.
        kept += bytes_ * (1 if gathers else 2) * stream.between + norm.saved_bytes * stream.tokens_between
        if gathers:
            inputs = part.inputs[:1] if part is block.cross_attention else part.inputs
            of_token += _inputs(stage, part.name, inputs)
        if stage.config.model.hidden_dropout:
            kept += stream.between  # masks, a byte each
        if isinstance(part, Mlp):
            of_token += bytes_ * _mlp_elements(stage, part, selective) + _inputs(stage, part.name, (part.output,))
        elif part is block.cross_attention or part.relative_bias is not None:
            kept += _masked_attention(stream, part, fused, selective)
        else:
            of_token += bytes_ * _attention_elements(stage, part, fused or selective)
            of_token += _inputs(stage, part.name, (part.output,), is_kept=fused and not selective)
            if not selective:
                kept += 4 * tokens * stream.heads if fused else probabilities_bytes(stream)
            if part.head_norms:  # a statistic of each head
                num_heads = stream.heads + stage.sizes["keys"] // stage.config.model.head_size
                kept += part.head_norms[0].saved_bytes * tokens * num_heads
    return kept + tokens * of_token


def _attention_elements(stage: StageModel, attention: Attention, keeps_no_copies: bool) -> int:
    """Elements a token that attention keeps beside its input, its output and its probabilities."""
    queries, keys = stage.sizes["queries"], stage.sizes["keys"]
    elements = queries + 2 * keys
    if attention.head_norms:
        elements += queries + keys  # before the norms
    if attention.is_fused and not keeps_no_copies:
        elements += 2 * keys  # keys and values laid out by heads, beside the product that the queries are a view of
    return elements


def _masked_attention(stream: Stream, attention: Attention, fused: bool, selective: bool) -> int:
    """Attention as `megatrain.model.masked_attention` computes it. To an encoder's output it is fused on a CPU too;
    with a bias that is trained it is written out there, in fp32."""
    stage, bytes_ = stream.stage, stream.stage.element_bytes
    num_keys = stream.seq_len if attention.relative_bias is not None else stream.source_len
    num_tokens = stream.tokens + stage.config.train.micro_batch_size * num_keys
    kept = 2 * bytes_ * stage.sizes["queries"] * num_tokens  # queries and output, keys and values
    if selective:
        return kept
    pairs = stream.heads * stream.pairs(num_keys)
    if stage.config.model.attention_dropout:  # probabilities, what is left of them, and the mask
        return kept + (2 * bytes_ + 1) * pairs
    if fused or attention.relative_bias is None:
        return kept + 4 * stream.tokens * stream.heads
    return kept + (4 - bytes_) * stage.sizes["queries"] * (3 * stream.tokens) + 4 * pairs


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


def probabilities_bytes(stream: Stream) -> int:
    """Of a layer's self-attention: in blocks of rows, from the first key that a block sees to its end, or where
    attention is not causal to the last key; with a trained bias of all pairs, in fp32."""
    stage, seq_len, attention = stream.stage, stream.seq_len, stream.stack.block.attention
    if attention.relative_bias is not None:
        return 4 * stream.heads * stream.pairs(seq_len)
    window = stage.config.model.attention_window or seq_len
    elements = 0
    for start in range(0, seq_len, _BLOCK_ROWS):
        end = min(start + _BLOCK_ROWS, seq_len)
        last = end if attention.is_causal else seq_len
        elements += (end - start) * (last - max(start - window + 1, 0))
    return stage.element_bytes * stream.heads * stage.config.train.micro_batch_size * elements

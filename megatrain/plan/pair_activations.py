"""What an encoder and its decoder keep of one micro-batch for the backward pass, in bytes: an estimate.

By the counts of `megatrain.plan.activations`, with attention as `megatrain.model.masked_attention` computes it.
"""

from __future__ import annotations

from megatrain.families.description import Block, Mlp
from megatrain.plan.stage_model import StageModel, share


def pair_activations(stage: StageModel, fused: bool) -> int:
    """``fused``: attention keeps no probabilities."""
    model, parallel, bytes_ = stage.config.model, stage.config.parallel, stage.element_bytes
    lengths = stage.tokens, stage.targets
    kept = 8 * 2 * sum(lengths) + bytes_ * stage.tokens * model.hidden_size  # ids, and what the decoder attends to
    for stack, tokens in zip(model.description.stacks, lengths, strict=True):
        count = model.num_layers(stack)
        num_recomputed = share(count, parallel.recompute_every) if parallel.recompute == "full" else 0
        kept += num_recomputed * bytes_ * _between(stage, tokens)
        kept += (count - num_recomputed) * _layer(stage, stack.block, tokens, fused)
        kept += 2 * bytes_ * _between(stage, tokens)  # the norm's input and what it gives
        if stack.block.attention.relative_bias is not None:
            kept += bytes_ * _pairs(stage, tokens, tokens)
    return kept + bytes_ * stage.targets * stage.sizes["vocab"]  # the gradient of the logits


def _layer(stage: StageModel, block: Block, tokens: int, fused: bool) -> int:
    selective, bytes_ = stage.config.parallel.recompute == "selective", stage.element_bytes
    kept = 0
    for role, (norm, part) in block.branches.items():
        kept += 2 * bytes_ * _between(stage, tokens) + norm.saved_bytes * tokens
        if stage.config.model.hidden_dropout:
            kept += _between(stage, tokens)
        if isinstance(part, Mlp):
            num_kept = len(part.inputs) + (part.is_gated and not selective) + 1
            kept += bytes_ * num_kept * tokens * stage.sizes["ffn"]
        else:
            num_keys = stage.tokens if role == "cross_attention" else tokens
            kept += _attention(stage, tokens, num_keys, is_kept=not (fused or selective))
    return kept


def _attention(stage: StageModel, num_queries: int, num_keys: int, *, is_kept: bool) -> int:
    """Queries and the output's input, keys and values, and where ``is_kept`` the probabilities."""
    elements = 2 * (num_queries + num_keys) * stage.sizes["queries"]
    if is_kept:
        elements += _pairs(stage, num_queries, num_keys)
    return stage.element_bytes * elements


def _pairs(stage: StageModel, num_queries: int, num_keys: int) -> int:
    """Pairs of a query and a key in all heads, for tokens of a micro-batch."""
    heads = stage.sizes["queries"] // stage.config.model.head_size
    return heads * num_queries * num_keys // stage.config.train.micro_batch_size


def _between(stage: StageModel, tokens: int) -> int:
    """Elements of the residual stream on this rank."""
    parallel = stage.config.parallel
    return tokens * stage.config.model.hidden_size // (parallel.tensor if parallel.sequence else 1)

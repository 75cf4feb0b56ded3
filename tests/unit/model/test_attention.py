"""Attention in blocks of rows is the attention of the fused kernel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatrain.batch import document_starts
from megatrain.model.attention import CoreAttention
from megatrain.model.blockwise_attention import BLOCK_ROWS, blockwise_attention
from megatrain.model.context import Context
from megatrain.model.dropout import Dropout


def random_heads(num_tokens: int, num_heads: int, num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, num_tokens, heads, 16) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def fused(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_output_and_gradients_equal_the_fused_kernels(num_tokens: int, num_groups: int, is_causal: bool) -> None:
    inputs = random_heads(num_tokens, 4, num_groups, torch.float64)
    grad = torch.randn_like(inputs[0])
    ours, theirs = blockwise_attention(*inputs, None, None, None, is_causal), fused(*inputs, is_causal)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def masked(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: Dropout | None = None) -> Tensor:
    """By the definition, all probabilities at once; heads by key-value groups; samples 0 and 1."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((distance < 0) | (distance >= window), -math.inf)
    weights = scores.softmax(-1)
    return ((dropout.drop(weights, torch.arange(2)) if dropout else weights) @ v).transpose(1, 2)


@pytest.mark.parametrize("way", ["blockwise", "dense mask", "dropping"])
@pytest.mark.parametrize("window", [1, 5, BLOCK_ROWS + 70, 1000])
def test_windowed_output_and_gradients_follow_the_definition(
    window: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreAttention, "max_blockwise_tokens", 0 if way == "dense mask" else 2048)
    inputs = random_heads(2 * BLOCK_ROWS + 5, 4, 2, torch.float64)
    grad = torch.randn_like(inputs[0])
    dropout = Dropout(0.3 if way == "dropping" else 0.0, 0, "core", 3)
    context = Context(torch.zeros(2, inputs[0].shape[1]), sample_ids_B=torch.arange(2))
    ours = CoreAttention(dropout, window)(*inputs, context)
    theirs = masked(*inputs, window, dropout if dropout.is_active else None)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("longest_blockwise", [2048, 0], ids=["blockwise", "dense mask"])
def test_a_window_ends_at_a_documents_border(longest_blockwise: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreAttention, "max_blockwise_tokens", longest_blockwise)
    q, k, v = random_heads(300, 4, 2, torch.float32)
    lengths, core = (70, 1, 180, 49), CoreAttention(Dropout(0.0, 0, "core", 3), window=20)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    together = core(q, k, v, Context(torch.zeros(2, 300), ids))
    pieces = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    alone = [core(*piece, Context(torch.zeros(2, piece[0].shape[1]))) for piece in pieces]
    torch.testing.assert_close(together, torch.cat(alone, 1))


@pytest.mark.parametrize("way", ["blockwise", "dense mask", "borders"])
def test_two_sided_attention_ends_at_documents_borders(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoreAttention, "max_blockwise_tokens", 2048 if way == "blockwise" else 0)
    q, k, v = random_heads(300, 4, 2, torch.float32)
    lengths, core = (70, 1, 180, 49), CoreAttention(Dropout(0.0, 0, "core", 3), is_causal=False)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    context = Context(torch.zeros(2, 300), ids, document_starts=document_starts(ids) if way == "borders" else None)
    pieces = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    alone = [fused(*piece, is_causal=False) for piece in pieces]
    torch.testing.assert_close(core(q, k, v, context), torch.cat(alone, 1))


def test_a_single_query_sees_the_windows_keys() -> None:
    q, k, v = random_heads(50, 4, 2, torch.float32)
    core, context = CoreAttention(Dropout(0.0, 0, "core", 3), window=7), Context(torch.zeros(2, 50))
    torch.testing.assert_close(core(q[:, -1:], k, v, context), core(q, k, v, context)[:, -1:])


def test_bfloat16_is_as_near_as_the_fused_kernel() -> None:
    exact = random_heads(400, 4, 2, torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    grad = torch.randn_like(exact[0])
    truth = torch.autograd.grad(fused(*exact), exact, grad)
    ours = torch.autograd.grad(blockwise_attention(*rounded, None, None, None), rounded, grad.bfloat16())
    theirs = torch.autograd.grad(fused(*rounded), rounded, grad.bfloat16())
    for mine, reference, true in zip(ours, theirs, truth, strict=True):
        assert (mine - true).norm() < 1.5 * (reference - true).norm() + 1e-3 * true.norm()


def test_some_heads_are_computed_as_among_all() -> None:
    q, k, v = random_heads(50, 4, 2, torch.float32)
    core, context = CoreAttention(Dropout(0.0, 0, "core", 3)), Context(torch.zeros(2, 50))
    whole = core(q, k, v, context)
    second_half = core(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], context)
    torch.testing.assert_close(second_half, whole[:, :, 2:])

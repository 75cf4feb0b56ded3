"""Attention in blocks of rows is the attention of the fused kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatrain.model.attention import CoreAttention
from megatrain.model.blockwise_attention import BLOCK_ROWS, blockwise_attention
from megatrain.model.context import Context, KeyValueCache
from megatrain.model.dropout import Dropout


def random_heads(num_tokens: int, num_heads: int, num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, num_tokens, heads, 16) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_output_and_gradients_equal_the_fused_kernels(num_tokens: int, num_groups: int) -> None:
    inputs = random_heads(num_tokens, 4, num_groups, torch.float64)
    grad = torch.randn_like(inputs[0])
    ours, theirs = blockwise_attention(*inputs, None, None), fused(*inputs)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_bfloat16_is_as_near_as_the_fused_kernel() -> None:
    exact = random_heads(400, 4, 2, torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    grad = torch.randn_like(exact[0])
    truth = torch.autograd.grad(fused(*exact), exact, grad)
    ours = torch.autograd.grad(blockwise_attention(*rounded, None, None), rounded, grad.bfloat16())
    theirs = torch.autograd.grad(fused(*rounded), rounded, grad.bfloat16())
    for mine, reference, true in zip(ours, theirs, truth, strict=True):
        assert (mine - true).norm() < 1.5 * (reference - true).norm() + 1e-3 * true.norm()


def test_some_heads_are_computed_as_among_all() -> None:
    q, k, v = random_heads(50, 4, 2, torch.float32)
    core, context = CoreAttention(Dropout(0.0, 0, "core", 3)), Context(torch.zeros(2, 50))
    whole = core(q, k, v, context)
    second_half = core(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], context)
    torch.testing.assert_close(second_half, whole[:, :, 2:])


def test_a_cache_refuses_several_tokens_after_the_prompt() -> None:
    cache = KeyValueCache(num_layers=1, capacity=8)
    cache.update(0, torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2))
    cache.advance(4)
    with pytest.raises(ValueError, match="one token at a time"):
        cache.update(0, torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))

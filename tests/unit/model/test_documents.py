"""Several documents in one sequence: each is computed as if it were alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from model_samples import SIZES, logits, random_batch
from torch import Tensor
from torch.torch_version import TorchVersion

from megatrain.batch import document_starts
from megatrain.config.schema import ModelConfig
from megatrain.model import attention
from megatrain.model.attention import CoreAttention
from megatrain.model.context import TORCH_VERSION, Context
from megatrain.model.decoder import Decoder
from megatrain.model.dropout import Dropout
from megatrain.model.init import init_model

LENGTHS = (70, 1, 131, 54)  # one that crosses a block of rows, one of a single token
FAMILIES = [{}, {"family": "gpt2"}, {"family": "mistral", "sliding_window": 50}]
each_family = pytest.mark.parametrize("keys", FAMILIES, ids=str)
each_way = pytest.mark.parametrize("longest_blockwise", [2048, 0], ids=["blockwise", "fused"])


def _decoder(keys: dict[str, Any]) -> Decoder:
    config = ModelConfig(**SIZES, **keys, initializer_range=0.1)
    model = Decoder(config).eval()
    init_model(model, config, seed=1)
    return model


@each_way
@each_family
def test_each_document_gives_the_logits_it_gives_alone(
    keys: dict[str, Any], longest_blockwise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreAttention, "max_blockwise_tokens", longest_blockwise)
    model = _decoder(keys)
    tokens_BT = random_batch(2, sum(LENGTHS)).tokens_BT
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    with torch.no_grad():
        together = model.logits(tokens_BT, model.make_context(positions_BT, _document_ids(2), None, torch.float32))
        alone = torch.cat([logits(model, part) for part in tokens_BT.split(LENGTHS, 1)], 1)
        blind = logits(model, tokens_BT, positions_BT)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (blind - alone).abs().max() > 1e-2


@each_way
@each_family
def test_another_documents_token_changes_no_bit(
    keys: dict[str, Any], longest_blockwise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreAttention, "max_blockwise_tokens", longest_blockwise)
    model = _decoder(keys)
    positions_BT = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    context = model.make_context(positions_BT, _document_ids(2), None, torch.float32)
    tokens_BT = random_batch(2, sum(LENGTHS)).tokens_BT.clone()
    ends = [*itertools.accumulate(LENGTHS)]
    with torch.no_grad():
        before = model.logits(tokens_BT, context)
        for changed, end in enumerate(ends):
            other_BT = tokens_BT.clone()
            other_BT[:, end - LENGTHS[changed]] = (other_BT[:, end - LENGTHS[changed]] + 1) % SIZES["vocab_size"]
            parts = zip(before.split(LENGTHS, 1), model.logits(other_BT, context).split(LENGTHS, 1), strict=True)
            same = [torch.equal(one, two) for one, two in parts]
            assert same == [number != changed for number in range(len(LENGTHS))]


def test_no_gradient_crosses_a_document_border() -> None:
    q, k, v = (torch.randn(1, sum(LENGTHS), 2, 8, requires_grad=True) for _ in range(3))
    out = CoreAttention(Dropout(0.0, 0, "core", num_offsets=3))(q, k, v, _context(_document_ids(1)))
    start, end = 71, 202  # the third document
    out[:, start:end].sum().backward()
    for x in (k, v):
        assert x.grad is not None
        assert x.grad[:, start:end].abs().sum() > 0
        assert x.grad[:, :start].abs().sum() == 0
        assert x.grad[:, end:].abs().sum() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_groups", [4, 2])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("version", [TORCH_VERSION, "2.11"], ids=["this torch", "without enable_gqa"])
def test_flash_attention_over_documents_is_masked_attention(
    version: str, window: int | None, num_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TORCH_VERSION", TorchVersion(version))
    ids_BT = _document_ids(2).contiguous().cuda()
    shapes = [(2, sum(LENGTHS), heads, 64) for heads in (4, num_groups, num_groups)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    core = CoreAttention(Dropout(0.0, 0, "core", num_offsets=3), window)
    masked, flash = (core(*inputs, context) for context in (_context(ids_BT), _flash_context(ids_BT)))
    torch.testing.assert_close(flash, masked, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(masked)
    grads = [torch.autograd.grad(out, inputs, weights) for out in (masked, flash)]
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=4e-2, rtol=4e-2)


def test_document_starts_are_of_each_sequence() -> None:
    ids_BT = torch.tensor([[5, 5, 6, 6], [6, 6, 6, 7]], dtype=torch.int32)
    assert document_starts(ids_BT).tolist() == [0, 2, 4, 7, 8]
    assert document_starts(ids_BT).dtype == torch.int32


def _document_ids(num_sequences: int) -> Tensor:
    ids = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(LENGTHS)])
    return ids.expand(num_sequences, -1)


def _context(document_ids_BT: Tensor) -> Context:
    return Context(torch.zeros_like(document_ids_BT), document_ids_BT)


def _flash_context(document_ids_BT: Tensor) -> Context:
    return _context(document_ids_BT)._replace(document_starts=document_starts(document_ids_BT))

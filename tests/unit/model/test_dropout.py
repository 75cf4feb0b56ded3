"""Dropout depends on the sample and the place alone: not on the batch, the slice, the mode of memory, or any state."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from model_samples import SIZES, random_batch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatrain.batch import Batch
from megatrain.config.schema import ModelConfig
from megatrain.model.attention import CoreAttention
from megatrain.model.context import Context
from megatrain.model.decoder import Decoder
from megatrain.model.dropout import Dropout
from megatrain.model.init import init_model


def dropping_decoder(family: Any, seed: int = 3) -> Decoder:
    config = ModelConfig(**SIZES, family=family, attention_dropout=0.2, hidden_dropout=0.1)
    model = Decoder(config, seed)
    init_model(model, config, seed=1)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_halves_of_a_batch_sum_to_it(family: Any) -> None:
    model, batch = dropping_decoder(family), random_batch(4, 150)
    halves = [Batch(*(None if x is None else x[rows] for x in batch)) for rows in (slice(0, 2), slice(2, 4))]  # type: ignore[arg-type]
    assert model(batch).item() == pytest.approx(sum(model(half).item() for half in halves), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_seed_sample_and_mode_decide(family: Any) -> None:
    model, batch = dropping_decoder(family), random_batch(2, 100)
    loss = model(batch).item()
    assert model(batch).item() == loss
    assert model(batch._replace(sample_ids_B=batch.sample_ids_B + 1)).item() != loss
    assert dropping_decoder(family, seed=4)(batch).item() != loss
    model.eval()
    assert model(batch).item() == model(batch._replace(sample_ids_B=batch.sample_ids_B + 1)).item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_has_a_mask_of_its_own(family: Any) -> None:
    sites = [module.site for module in dropping_decoder(family).modules() if isinstance(module, Dropout)]
    assert len(sites) == len(set(sites)) == 3 * SIZES["num_hidden_layers"] + 1


def test_recomputation_drops_the_same() -> None:
    batch, gradients = random_batch(2, 150), []
    for recomputes in (False, True):
        model = dropping_decoder("llama")
        for module in model.modules() if recomputes else ():
            if isinstance(module, CoreAttention):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        model(batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_a_slice_of_tokens_drops_its_part() -> None:
    x_BTC, samples = torch.randn(2, 12, 16), torch.tensor([7, 8])
    whole, part = Dropout(0.5, 1, "site"), Dropout(0.5, 1, "site")
    part.offsets = (4, 8)
    assert torch.equal(part(x_BTC[:, 4:, 8:], samples), whole(x_BTC, samples)[:, 4:, 8:])


def test_some_heads_drop_their_own_probabilities() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 300, 4, 8), torch.randn(2, 300, 2, 8), torch.randn(2, 300, 2, 8)
    context = Context(torch.zeros(2, 300), sample_ids_B=torch.tensor([3, 9]))
    core = CoreAttention(Dropout(0.3, 1, "core", num_offsets=3))
    whole = core(q, k, v, context)
    core.dropout.offsets = (2, 0, 0)
    torch.testing.assert_close(core(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], context), whole[:, :, 2:])


def test_attention_with_dropout_is_the_plain_formula() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 300, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    dropout = Dropout(0.3, 1, "core", num_offsets=3)
    context = Context(torch.zeros(2, 300), sample_ids_B=torch.tensor([3, 9]))
    ours, plain = CoreAttention(dropout)(*inputs, context), _plain_attention(*inputs, dropout, context)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn_like(plain)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


def test_without_a_probability_the_input_itself_is_returned() -> None:
    x = torch.randn(1, 2, 3)
    assert Dropout(0.0, 1, "site")(x, None) is x
    assert Dropout(0.5, 1, "site").eval()(x, None) is x


def test_training_without_sample_ids_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="some site"):
        Dropout(0.5, 1, "some site")(torch.randn(1, 2, 3), None)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, context: Context) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT / 8**0.5
    weights = scores.masked_fill(torch.ones(300, 300, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    return (dropout(weights, context.sample_ids_B) @ v).transpose(1, 2)

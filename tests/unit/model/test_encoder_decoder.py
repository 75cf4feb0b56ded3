"""A T5 beside that of transformers, with the same random weights: logits, gradients, generation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from megatrain.batch import Batch
from megatrain.config.schema import ModelConfig
from megatrain.model.beams import BeamSearch, beam_search
from megatrain.model.encoder_decoder import EncoderDecoder
from megatrain.model.generate import Limits, Sampling, generate_batch
from megatrain.model.init import init_model, standard_deviation

VOCAB_SIZE, END = 131, 1
CONFIG = ModelConfig(
    family="t5",
    hidden_size=32,
    head_dim=12,  # 4 heads: not as wide as the stream
    intermediate_size=48,
    num_hidden_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=20,  # so that the longest range is a short one
    max_position_embeddings=64,
    vocab_size=VOCAB_SIZE,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
SOURCES = [[5, 9, 17, 40, END], [3, END], [77, 8, 8, 21, 60, 12, 90, END]]


@pytest.fixture(scope="module")
def twin() -> T5ForConditionalGeneration:
    """A head of its own, which a fresh T5 has not; norms that are not one."""
    torch.manual_seed(2)
    sizes = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}
    sizes |= {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 20}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **sizes, **kind, **ends))
    model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 else noise)
    return model.eval()


@pytest.fixture(scope="module")
def model(twin: T5ForConditionalGeneration) -> EncoderDecoder:
    ours = EncoderDecoder(CONFIG)
    state = twin.state_dict()
    ours.load_state_dict({name: state[name] for name, _ in ours.named_parameters()})
    return ours.eval()


def random_batch(source_len: int, target_len: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    source, target, inputs = (
        torch.randint(2, VOCAB_SIZE, (2, length), generator=generator)
        for length in (source_len, target_len, target_len)
    )
    positions = torch.arange(target_len).expand(2, -1)
    places = torch.arange(source_len).expand(2, -1)
    batch = Batch(inputs, target, None, positions, None, torch.arange(2))
    return batch._replace(source_tokens_BS=source, source_positions_BS=places)


def logits(model: EncoderDecoder, source: Tensor, inputs: Tensor) -> Tensor:
    context = model.make_context(torch.arange(inputs.shape[1]).expand_as(inputs), None, None, model.dtype)
    encoded = model.encode(source, None, None, None)
    return model.head(model.decode(inputs, context._replace(encoded=encoded)))


def test_logits_and_gradients_are_those_of_transformers(
    twin: T5ForConditionalGeneration, model: EncoderDecoder
) -> None:
    """At distances beyond the last range, and of unequal lengths."""
    batch = random_batch(50, 40)
    assert batch.source_tokens_BS is not None
    expected = twin(input_ids=batch.source_tokens_BS, decoder_input_ids=batch.tokens_BT).logits
    torch.testing.assert_close(logits(model, batch.source_tokens_BS, batch.tokens_BT), expected, atol=1e-5, rtol=1e-5)
    loss = model(batch)
    loss.backward()
    functional.cross_entropy(expected.flatten(0, 1), batch.targets_BM.flatten(), reduction="sum").backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - theirs[name].grad).norm() < 1e-4 * theirs[name].grad.norm(), name


def test_a_t5_starts_as_in_transformers() -> None:
    """Each weight as wide, but for a head of its own: that of T5 gives logits of variance 1."""
    wider = CONFIG.model_copy(update={"hidden_size": 64, "intermediate_size": 160})
    sizes = {"d_model": 64, "d_kv": 12, "d_ff": 160, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    torch.manual_seed(3)
    theirs = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, feed_forward_proj="gated-gelu", relative_attention_num_buckets=256, **sizes)
    )
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 2 and name != "lm_head.weight":
            expected = standard_deviation(name, wider)
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=5 / parameter.numel() ** 0.5), name
    ours = EncoderDecoder(wider)
    init_model(ours, wider, seed=1)
    batch = random_batch(50, 40)
    with torch.no_grad():
        loss = float(ours(batch)) / batch.targets_BM.numel()
    assert 0.0 < loss - math.log(VOCAB_SIZE) < 1.0  # half of the logits' variance


def test_a_target_does_not_see_what_follows_it(model: EncoderDecoder) -> None:
    batch = random_batch(9, 12)
    assert batch.source_tokens_BS is not None
    changed = batch.tokens_BT.clone()
    changed[:, 7:] = 3
    with torch.no_grad():
        before, after = (logits(model, batch.source_tokens_BS, x) for x in (batch.tokens_BT, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_packed_pairs_are_as_if_each_were_alone(model: EncoderDecoder) -> None:
    """Two pairs of unequal lengths in one row, and filling behind both; sources in another order would be seen."""
    first, second = random_batch(9, 5), random_batch(14, 11)
    parts = [(first.source_tokens_BS, first), (second.source_tokens_BS, second)]
    filling = torch.full((2, 3), 4)
    source = torch.cat([first.source_tokens_BS, second.source_tokens_BS, filling], 1)  # type: ignore[list-item]
    source_ids = torch.tensor([0] * 9 + [1] * 14 + [2] * 3).expand(2, -1)
    inputs = torch.cat([first.tokens_BT, second.tokens_BT, filling], 1)
    targets = torch.cat([first.targets_BM, second.targets_BM, filling], 1)
    ids = torch.tensor([0] * 5 + [1] * 11 + [1] * 3).expand(2, -1)
    mask = torch.tensor([True] * 16 + [False] * 3).expand(2, -1)
    positions = torch.arange(19).expand(2, -1)
    packed = Batch(inputs, targets, mask, positions, ids, torch.arange(2))
    packed = packed._replace(source_tokens_BS=source, source_document_ids_BS=source_ids)
    with torch.no_grad():
        alone = sum(float(model(batch)) for _, batch in parts)
        assert float(model(packed)) == pytest.approx(alone, rel=1e-6)


def generated(model: EncoderDecoder, sources: list[list[int]], num_new: int) -> list[list[int]]:
    steps = generate_batch(model, [[0]] * len(sources), Limits(num_new, (END,)), Sampling(), sources=sources)
    rows: list[list[int]] = [[] for _ in sources]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
    return rows


def padded(sources: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, sources))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sources]),
    }


def without_padding(row: Tensor) -> list[int]:
    tokens: list[int] = row.tolist()[1:]
    return tokens[: tokens.index(END)] if END in tokens else tokens


def test_greedy_generation_is_that_of_transformers(twin: T5ForConditionalGeneration, model: EncoderDecoder) -> None:
    """Beyond the last range of distances; sources of unequal lengths, which padding does not change."""
    found = generated(model, SOURCES, 30)
    expected = twin.generate(**padded(SOURCES), max_new_tokens=30, do_sample=False, num_beams=1)
    assert found == [without_padding(row) for row in expected]
    assert [generated(model, [source], 30)[0] for source in SOURCES] == found


@pytest.mark.parametrize("length_penalty", [1.0, 0.4])
def test_beams_are_those_of_transformers(
    length_penalty: float, twin: T5ForConditionalGeneration, model: EncoderDecoder
) -> None:
    search = BeamSearch(3, length_penalty)
    found = beam_search(model, [[0]] * 3, Limits(9, (END,)), search, sources=SOURCES)
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": length_penalty, "early_stopping": False}
    expected = twin.generate(**padded(SOURCES), max_new_tokens=9, do_sample=False, **settings)
    assert [list(each.tokens) for row in found for each in row] == [without_padding(row) for row in expected]
    (alone,) = beam_search(model, [[0]], Limits(9, (END,)), search, sources=SOURCES[1:2])
    assert [each.tokens for each in alone] == [each.tokens for each in found[1]]
    assert [each.score for each in alone] == pytest.approx([each.score for each in found[1]], rel=1e-5)

"""Encoders with their decoders beside those of transformers, with the same random weights: logits, gradients,
generation."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

from megatrain.batch import Batch
from megatrain.checkpoint.transformers_config import to_transformers
from megatrain.config.schema import LoraConfig, ModelConfig
from megatrain.model.beams import BeamSearch, beam_search
from megatrain.model.encoder_decoder import EncoderDecoder
from megatrain.model.generate import Limits, Sampling, generate_batch
from megatrain.model.linear import add_adapters
from megatrain.plan.flops import adapter_shapes

VOCAB_SIZE, START, END = 131, 0, 1
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_decoder_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCAB_SIZE}
T5 = {
    "family": "t5",
    "head_dim": 12,  # 4 heads: not as wide as the stream
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,  # so that the longest range is a short one
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 97}
MODELS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "marian": {"family": "marian"},
    "the paper's": {"family": "marian", "scale_embedding": True, "activation_function": "relu"},
    "two vocabularies": {"family": "marian", "activation_function": "swish", **SEPARATE},
    "untied": {"family": "marian", "tie_word_embeddings": False, **SEPARATE},
}
SOURCES = [[5, 9, 17, 40, END], [3, END], [77, 8, 8, 21, 60, 12, 90, END]]
Twin: TypeAlias = T5ForConditionalGeneration | MarianMTModel


@pytest.fixture(scope="module", params=MODELS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(**{**SIZES, **MODELS[request.param]})


@pytest.fixture(scope="module")
def twin(config: ModelConfig) -> Twin:
    """Of T5 with a head of its own, which a fresh one has not; norms that are not one, biases that are not zero."""
    torch.manual_seed(2)
    theirs = to_transformers(config, "float32") | {"pad_token_id": START, "eos_token_id": END}
    theirs |= {"decoder_start_token_id": START}
    model: Twin
    if config.family == "t5":
        model = T5ForConditionalGeneration(T5Config(**theirs))
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, 32))
    else:
        model = MarianMTModel(MarianConfig(**theirs))
    varied = {name: x for name, x in model.named_parameters() if "embed_positions" not in name}
    with torch.no_grad():
        for parameter in [*varied.values(), *([] if config.family == "t5" else [model.final_logits_bias])]:
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 else noise)
        if config.family == "marian":
            model.final_logits_bias[0, START] += 2.0  # likely, were it not suppressed
    return model.eval()


@pytest.fixture(scope="module")
def model(twin: Twin, config: ModelConfig) -> EncoderDecoder:
    ours = EncoderDecoder(config)
    state = dict(twin.state_dict())
    if "final_logits_bias" in state:
        state["lm_head.bias"] = state["final_logits_bias"][0]
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return ours.eval()


def random_batch(source_len: int, target_len: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    source, target, inputs = (
        torch.randint(2, size, (2, length), generator=generator)
        for size, length in ((VOCAB_SIZE, source_len), (97, target_len), (97, target_len))
    )
    positions = torch.arange(target_len).expand(2, -1)
    places = torch.arange(source_len).expand(2, -1)
    batch = Batch(inputs, target, None, positions, None, torch.arange(2))
    return batch._replace(source_tokens_BS=source, source_positions_BS=places)


def test_logits_and_gradients_are_those_of_transformers(twin: Twin, model: EncoderDecoder) -> None:
    """At distances beyond the last range, and of unequal lengths."""
    batch = random_batch(50, 40)
    assert batch.source_tokens_BS is not None
    expected = twin(input_ids=batch.source_tokens_BS, decoder_input_ids=batch.tokens_BT).logits
    torch.testing.assert_close(model.logits(batch.source_tokens_BS, batch.tokens_BT), expected, atol=1e-5, rtol=1e-5)
    loss = model(batch)
    loss.backward()
    functional.cross_entropy(expected.flatten(0, 1), batch.targets_BM.flatten(), reduction="sum").backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    if isinstance(twin, MarianMTModel):  # whose bias is not trained
        theirs["lm_head.bias"] = functional.one_hot(batch.targets_BM.flatten(), expected.shape[-1]).sum(0).neg()
        theirs["lm_head.bias"] = theirs["lm_head.bias"] + expected.detach().softmax(-1).sum((0, 1))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name.endswith("k_proj.bias"):  # adds the same to all scores of a query: zero but for rounding
            continue
        smallest = 0.05 if isinstance(twin, MarianMTModel) else 0.0  # below, it is a difference of larger numbers
        assert (parameter.grad - theirs[name]).norm() < 1e-4 * max(theirs[name].norm(), smallest), name


def test_adapters_compute_what_those_of_peft_do(config: ModelConfig, twin: Twin, model: EncoderDecoder) -> None:
    targets = ("q", "v", "wi_0", "wo") if config.family == "t5" else ("q_proj", "v_proj", "fc1", "fc2")
    lora = LoraConfig(rank=6, alpha=21.0, target_modules=targets)
    ours, batch = copy.deepcopy(model), random_batch(20, 14)
    assert batch.source_tokens_BS is not None
    add_adapters(ours, lora)
    settings = PeftConfig(r=6, lora_alpha=21, target_modules=[*lora.target_modules])
    theirs = get_peft_model(copy.deepcopy(twin), settings).eval()
    adapters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    assert shapes == {name: tuple(p.shape) for name, p in adapters.items()} == adapter_shapes(config, lora)
    with torch.no_grad():
        for name, parameter in trained.items():
            adapters[name].normal_(std=0.1)
            parameter.copy_(adapters[name])
    ours(batch).backward()
    expected = theirs(input_ids=batch.source_tokens_BS, decoder_input_ids=batch.tokens_BT).logits
    functional.cross_entropy(expected.flatten(0, 1), batch.targets_BM.flatten(), reduction="sum").backward()
    torch.testing.assert_close(ours.logits(batch.source_tokens_BS, batch.tokens_BT), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, adapters[name].grad, atol=1e-4, rtol=1e-4)


def test_a_target_does_not_see_what_follows_it(model: EncoderDecoder) -> None:
    batch = random_batch(9, 12)
    assert batch.source_tokens_BS is not None
    changed = batch.tokens_BT.clone()
    changed[:, 7:] = 3
    with torch.no_grad():
        before, after = (model.logits(batch.source_tokens_BS, x) for x in (batch.tokens_BT, changed))
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
    positions, source_positions = (
        torch.cat([*map(torch.arange, lengths)]).expand(2, -1) for lengths in ((5, 11, 3), (9, 14, 3))
    )
    packed = Batch(inputs, targets, mask, positions, ids, torch.arange(2))
    packed = packed._replace(
        source_tokens_BS=source, source_positions_BS=source_positions, source_document_ids_BS=source_ids
    )
    with torch.no_grad():
        alone = sum(float(model(batch)) for _, batch in parts)
        assert float(model(packed)) == pytest.approx(alone, rel=1e-6)


def limits(model: EncoderDecoder, num_new: int) -> Limits:
    suppressed = (START,) if model.config.description.never_writes_start else ()
    return Limits(num_new, (END,), suppress_ids=suppressed)


def generated(model: EncoderDecoder, sources: list[list[int]], num_new: int) -> list[list[int]]:
    starts = [[START]] * len(sources)
    steps = generate_batch(model, starts, limits(model, num_new), Sampling(), sources=sources)
    rows: list[list[int]] = [[] for _ in sources]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
    return rows


def theirs_of(twin: Twin, sources: list[list[int]], num_new: int, **settings: Any) -> Any:
    """What transformers generates; of Marian with the settings that come with its models."""
    longest = max(map(len, sources))
    ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
    mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
    if isinstance(twin, MarianMTModel):
        settings |= {"bad_words_ids": [[START]], "renormalize_logits": True}
        # transformers 5.5 counts the beams' vocabulary by vocab_size, which is the source's.
        twin.config.vocab_size = twin.config.decoder_vocab_size
    return twin.generate(input_ids=ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **settings)


def without_padding(row: Tensor) -> list[int]:
    tokens: list[int] = row.tolist()[1:]
    return tokens[: tokens.index(END)] if END in tokens else tokens


def test_greedy_generation_is_that_of_transformers(twin: Twin, model: EncoderDecoder) -> None:
    """Beyond the last range of distances; sources of unequal lengths, which padding does not change."""
    found = generated(model, SOURCES, 30)
    expected = theirs_of(twin, SOURCES, 30, num_beams=1)
    assert found == [without_padding(row) for row in expected]
    assert [generated(model, [source], 30)[0] for source in SOURCES] == found


def test_a_cached_step_is_the_whole_pass(model: EncoderDecoder) -> None:
    """The likeliest token after each prefix, of which nothing is kept."""
    (cached,) = generated(model, SOURCES[2:], 12)
    tokens = [START]
    for token in cached:
        with torch.no_grad():
            scores = model.logits(torch.tensor(SOURCES[2:]), torch.tensor([tokens]))[0, -1:]
        assert int(limits(model, 1).masked(scores).argmax()) == token
        tokens.append(token)


def test_one_beam_is_greedy(model: EncoderDecoder) -> None:
    found = beam_search(model, [[START]] * 3, limits(model, 9), BeamSearch(1), sources=SOURCES)
    assert [list(best.tokens) for (best,) in found] == generated(model, SOURCES, 9)


@pytest.mark.parametrize("length_penalty", [1.0, 0.4])
def test_beams_are_those_of_transformers(length_penalty: float, twin: Twin, model: EncoderDecoder) -> None:
    """With their scores; in a batch and alone; the best of three is what one is asked for."""
    search = BeamSearch(3, length_penalty)
    found = beam_search(model, [[START]] * 3, limits(model, 9), search, sources=SOURCES)
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": length_penalty, "early_stopping": False}
    scored = {"return_dict_in_generate": True, "output_scores": True}
    expected = theirs_of(twin, SOURCES, 9, **settings, **scored)
    flat = [each for row in found for each in row]
    assert [list(each.tokens) for each in flat] == [without_padding(row) for row in expected.sequences]
    assert [each.score for each in flat] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)
    best = theirs_of(twin, SOURCES, 9, **{**settings, "num_return_sequences": 1})
    assert [list(row[0].tokens) for row in found] == [without_padding(row) for row in best]
    (alone,) = beam_search(model, [[START]], limits(model, 9), search, sources=SOURCES[1:2])
    assert [each.tokens for each in alone] == [each.tokens for each in found[1]]
    assert [each.score for each in alone] == pytest.approx([each.score for each in found[1]], rel=1e-5)

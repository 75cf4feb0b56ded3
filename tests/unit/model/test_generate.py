"""Generation: what transformers generates, the same with and without a cache, within the model's limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import SIZES, decoder_like, logits, random_batch, twin

from megatrain.config.schema import ModelConfig
from megatrain.errors import ConfigError
from megatrain.model.context import KeyValueCache
from megatrain.model.decoder import Decoder
from megatrain.model.generate import Sampling, generate, next_logits

PROMPT = [5, 17, 99, 3, 64]
GREEDY = Sampling()
RANDOM = Sampling(temperature=1.0)


KEYS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 12}}


@pytest.fixture(params=KEYS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return small_model(request.param)


def small_model(family: str) -> Decoder:
    config = ModelConfig(**SIZES | {"max_position_embeddings": 64}, family=family, **KEYS[family])
    return decoder_like(twin(config), config)


@pytest.mark.parametrize("family", KEYS)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    config = ModelConfig(**SIZES, family=family, **KEYS[family])
    reference = twin(config)
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(generate(decoder_like(reference, config), PROMPT, 40, GREEDY)) == expected


def test_cached_logits_equal_those_of_the_whole_sequence(model: Decoder) -> None:
    tokens_BT = random_batch(1, 30).tokens_BT
    cache = KeyValueCache(model.config.num_hidden_layers, capacity=30)
    cached = [next_logits(model, tokens_BT[0, :20].tolist(), cache)]
    cached += [next_logits(model, [token], cache) for token in tokens_BT[0, 20:].tolist()]
    with torch.no_grad():
        whole = logits(model, tokens_BT)[0, 19:]
    torch.testing.assert_close(torch.stack(cached), whole, atol=1e-5, rtol=1e-5)


def test_the_seed_decides(model: Decoder) -> None:
    one, again, other = (list(generate(model, PROMPT, 30, RANDOM, seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_ids_beyond_the_tokenizers_are_never_chosen(model: Decoder) -> None:
    tokens = [
        t for seed in range(4) for t in generate(model, [1, 2], 50, Sampling(temperature=5.0), seed, vocab_size=20)
    ]
    assert set(tokens) <= set(range(20))
    assert max(tokens) > 10


def test_it_stops_before_the_end_token(model: Decoder) -> None:
    tokens = list(generate(model, PROMPT, 20, RANDOM, seed=1))
    assert list(generate(model, PROMPT, 20, RANDOM, seed=1, stop_ids=[tokens[7]])) == tokens[: tokens.index(tokens[7])]


def test_the_narrowest_choices_are_greedy(model: Decoder) -> None:
    greedy = list(generate(model, PROMPT, 20, GREEDY))
    assert list(generate(model, PROMPT, 20, Sampling(temperature=1.0, top_k=1))) == greedy
    assert list(generate(model, PROMPT, 20, Sampling(temperature=1.0, top_p=1e-6))) == greedy


@pytest.mark.parametrize("sampling", [Sampling(1e-40), Sampling(5e-324), Sampling(1.0, top_p=1e-320)])
def test_the_smallest_bounds_are_greedy(sampling: Sampling, model: Decoder) -> None:
    assert list(generate(model, PROMPT, 20, sampling)) == list(generate(model, PROMPT, 20, GREEDY))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_sampling_without_a_meaning_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**fields)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"2\^64"):
        generate(small_model("llama"), PROMPT, 5, RANDOM, seed)


def test_top_p_and_top_k_renormalize_likely_tokens() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    for sampling, shares in (
        (Sampling(temperature=1.0, top_p=0.65), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_k=3), {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
    ):
        chosen = [sampling.choose(logits_V, generator) for _ in range(2000)]
        assert {i: chosen.count(i) / 2000 for i in set(chosen)} == pytest.approx(shares, abs=0.05)


@pytest.mark.parametrize(
    ("prompt", "num_new", "says"),
    [
        (PROMPT, 60, "at most 59"),
        ([1] * 80, 1, r"embeddings\): shorten the prompt"),
        ([], 5, "empty"),
        ([131], 5, "0 to 130"),
        ([-1], 5, "0 to"),
    ],
)
def test_impossible_requests_fail_before_the_first_token(prompt: list[int], num_new: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        generate(small_model("llama"), prompt, num_new, GREEDY)


def test_the_last_position_can_be_filled(model: Decoder) -> None:
    assert len(list(generate(model, PROMPT, 59, GREEDY))) == 59

"""Generation: what transformers generates, the same with and without a cache, within the model's limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import SIZES, decoder_like, logits, random_batch, twin

from megatrain.config.schema import ModelConfig
from megatrain.errors import ConfigError
from megatrain.model.beams import BeamSearch, beam_search
from megatrain.model.context import KeyValueCache
from megatrain.model.decoder import Decoder
from megatrain.model.generate import Limits, Sampling, generate, generate_batch, next_logits

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
    assert list(generate(decoder_like(reference, config), PROMPT, Limits(40), GREEDY)) == expected


def test_cached_logits_equal_those_of_the_whole_sequence(model: Decoder) -> None:
    tokens_BT = random_batch(1, 30).tokens_BT
    cache = KeyValueCache(model.config.num_hidden_layers, capacity=30)
    cached = [next_logits(model, [tokens_BT[0, :20].tolist()], cache)[0]]
    cached += [next_logits(model, [[token]], cache)[0] for token in tokens_BT[0, 20:].tolist()]
    with torch.no_grad():
        whole = logits(model, tokens_BT)[0, 19:]
    torch.testing.assert_close(torch.stack(cached), whole, atol=1e-5, rtol=1e-5)


def test_the_seed_decides(model: Decoder) -> None:
    one, again, other = (list(generate(model, PROMPT, Limits(30), RANDOM, seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_ids_beyond_the_tokenizers_are_never_chosen(model: Decoder) -> None:
    tokens = [
        t for seed in range(4) for t in generate(model, [1, 2], Limits(50, num_ids=20), Sampling(temperature=5.0), seed)
    ]
    assert set(tokens) <= set(range(20))
    assert max(tokens) > 10


def test_it_stops_before_the_end_token(model: Decoder) -> None:
    tokens = list(generate(model, PROMPT, Limits(20), RANDOM, seed=1))
    assert list(generate(model, PROMPT, Limits(20, [tokens[7]]), RANDOM, seed=1)) == tokens[: tokens.index(tokens[7])]


def test_the_narrowest_choices_are_greedy(model: Decoder) -> None:
    greedy = list(generate(model, PROMPT, Limits(20), GREEDY))
    assert list(generate(model, PROMPT, Limits(20), Sampling(temperature=1.0, top_k=1))) == greedy
    assert list(generate(model, PROMPT, Limits(20), Sampling(temperature=1.0, top_p=1e-6))) == greedy


@pytest.mark.parametrize("sampling", [Sampling(1e-40), Sampling(5e-324), Sampling(1.0, top_p=1e-320)])
def test_the_smallest_bounds_are_greedy(sampling: Sampling, model: Decoder) -> None:
    assert list(generate(model, PROMPT, Limits(20), sampling)) == list(generate(model, PROMPT, Limits(20), GREEDY))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_sampling_without_a_meaning_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**fields)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"2\^64"):
        generate(small_model("llama"), PROMPT, Limits(5), RANDOM, seed)


def test_top_p_and_top_k_renormalize_likely_tokens() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    for sampling, shares in (
        (Sampling(temperature=1.0, top_p=0.65), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1.0, top_k=3), {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
    ):
        chosen = sampling.choose(logits_V.expand(2000, -1), [generator] * 2000)
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
        generate(small_model("llama"), prompt, Limits(num_new), GREEDY)


def test_the_last_position_can_be_filled(model: Decoder) -> None:
    assert len(list(generate(model, PROMPT, Limits(59), GREEDY))) == 59


PROMPTS = [[5, 17, 99, 3, 64], [7], [2, 4, 6, 8, 10, 12, 14, 16, 18], [1, 2], list(range(30, 47))]


def in_a_batch(model: Decoder, sampling: Sampling, stop_ids: list[int], num_new: int = 12) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for step in generate_batch(model, PROMPTS, Limits(num_new, stop_ids), sampling, seed=3):
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token]
    return rows


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, Sampling(0.0, repetition_penalty=1.3)])
def test_a_batch_gives_each_prompt_its_own(model: Decoder, sampling: Sampling) -> None:
    """Also after rows have ended: the stop ids end them at different steps."""
    free = [list(generate(model, prompt, Limits(12), sampling, 3)) for prompt in PROMPTS]
    assert in_a_batch(model, sampling, []) == free
    # Of all tokens one that ends the rows at different steps, if these random weights have one.
    ends = {token: {row.index(token) if token in row else 12 for row in free} for row in free for token in row}
    stop_ids = [max(ends, key=lambda token: len(ends[token]))]
    alone = [list(generate(model, prompt, Limits(12, stop_ids), sampling, 3)) for prompt in PROMPTS]
    assert in_a_batch(model, sampling, stop_ids) == alone
    assert len({len(tokens) for tokens in alone}) == len(ends[stop_ids[0]])


def test_padded_steps_give_the_same_tokens(model: Decoder) -> None:
    """As sequence parallelism asks for them: in a batch of prompts, and of one prompt up to the last position."""
    free, last = in_a_batch(model, GREEDY, []), list(generate(model, PROMPT, Limits(59), GREEDY))
    model.tokens_multiple = 4
    assert in_a_batch(model, GREEDY, []) == free
    assert list(generate(model, PROMPT, Limits(59), GREEDY)) == last


def test_the_caller_can_end_a_row(model: Decoder) -> None:
    ended: set[int] = set()
    seen = []
    for step in generate_batch(model, PROMPTS, Limits(6), GREEDY, ended=ended):
        seen.append([token is not None for token in step])
        ended |= {0, 2} if len(seen) == 2 else set()
    assert seen == [[True] * 5] * 2 + [[False, True, False, True, True]] * 4


@pytest.mark.parametrize("family", KEYS)
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(family: str, penalty: float) -> None:
    config = ModelConfig(**SIZES, family=family, **KEYS[family])
    reference = twin(config)
    settings = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": penalty}
    expected = reference.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()
    model = decoder_like(reference, config)
    assert list(generate(model, PROMPT, Limits(20), Sampling(repetition_penalty=penalty))) == expected


LONGER = (pytest.mark.slow, pytest.mark.acceptance)
STOPPING = [
    pytest.param(family, early_stopping, marks=() if family == "llama" or early_stopping is False else LONGER)
    for family in KEYS
    for early_stopping in (False, True, "never")
]


@pytest.mark.parametrize("num_beams", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "early_stopping"), STOPPING)
def test_beams_and_scores_are_those_of_transformers(num_beams: int, family: str, early_stopping: Any) -> None:
    config = ModelConfig(**SIZES, family=family, **KEYS[family])
    reference = twin(config)
    model = decoder_like(reference, config)
    greedy = list(generate(model, PROMPT, Limits(12), GREEDY))
    ends = [greedy[2], 11]
    every = (-1.0, 0.0, 0.5, 1.0, 2.0)  # all where scores decide when it ends, and of the rest the formula's two sides
    for length_penalty in every if early_stopping != "never" and family == "llama" else (-1.0, 2.0):
        found = beam_search(model, PROMPTS, Limits(12, ends), BeamSearch(num_beams, length_penalty, early_stopping))
        for prompt, hypotheses in zip(PROMPTS, found, strict=True):
            expected = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                do_sample=False,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                eos_token_id=ends,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            pairs = zip(expected.sequences[:, len(prompt) :].tolist(), expected.sequences_scores.tolist(), strict=True)
            assert len(hypotheses) == num_beams
            for hypothesis, (tokens, score) in zip(hypotheses, pairs, strict=True):
                end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                assert list(hypothesis.tokens) == tokens[:end]
                assert hypothesis.score == pytest.approx(score, abs=1e-5, rel=1e-5)


def test_more_beams_than_tokens_are_refused(model: Decoder) -> None:
    with pytest.raises(ConfigError, match="give fewer beams"):
        beam_search(model, [PROMPT], Limits(3), BeamSearch(1000))

"""What each transform makes of tokens: as many, by its definition, and from the generator alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.transforms import SHORTEST, FillInTheMiddle, SpanCorruption, TokenMasking, Tokens, Transform

PREFIX, MIDDLE, SUFFIX, MASK = 1000, 1001, 1002, 1003
SENTINELS = tuple(range(2000, 2100))
lengths, seeds = st.integers(SHORTEST, 700), st.integers(0, 2**32)


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def parts_of_psm(tokens: Tokens) -> tuple[list[int], list[int], list[int]]:
    """Text before the gap, in it, and behind it."""
    assert tokens[0] == PREFIX
    (suffix,), (middle,) = np.flatnonzero(tokens == SUFFIX), np.flatnonzero(tokens == MIDDLE)
    return tokens[1:suffix].tolist(), tokens[middle + 1 :].tolist(), tokens[suffix + 1 : middle].tolist()


@settings(deadline=None)
@given(lengths, seeds)
def test_prefix_suffix_middle_restores_the_text(length: int, seed: int) -> None:
    tokens = np.arange(length)
    made = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, spm_rate=0.0)(tokens, generator(seed))
    before, middle, behind = parts_of_psm(made)
    assert before + middle + behind == tokens[:-3].tolist()
    assert len(made) == length


@settings(deadline=None)
@given(lengths, seeds)
def test_suffix_prefix_middle_restores_the_text(length: int, seed: int) -> None:
    tokens = np.arange(length)
    made = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, spm_rate=1.0)(tokens, generator(seed))
    assert made[:2].tolist() == [PREFIX, SUFFIX]
    (at,) = np.flatnonzero(made == MIDDLE)
    assert made[at + 1 :].tolist() + made[2:at].tolist() == tokens[:-3].tolist()
    assert len(made) == length


def test_orders_follow_their_rate_and_cuts_are_uniform() -> None:
    transform = FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, spm_rate=0.25)
    made = [transform(np.arange(103), generator(seed)) for seed in range(4000)]
    psm = [parts_of_psm(tokens) for tokens in made if tokens[1] != SUFFIX]
    is_spm = [tokens[1] == SUFFIX for tokens in made]
    assert np.mean(is_spm) == pytest.approx(0.25, abs=0.03)
    means = np.mean([[len(part) for part in parts] for parts in psm], axis=0)
    assert means == pytest.approx([100 / 3] * 3, abs=2.5)  # two uniform cuts divide a line in three equal expectations


@settings(deadline=None)
@given(lengths, seeds, st.floats(0.01, 0.99), st.floats(1.0, 50.0), st.integers(1, 100))
def test_spans_at_their_sentinels_restore_the_text(
    length: int, seed: int, corrupted: float, mean: float, num_sentinels: int
) -> None:
    tokens = np.arange(length)
    made = SpanCorruption(SENTINELS[:num_sentinels], corrupted, mean)(tokens, generator(seed))
    assert len(made) == length
    marks = np.flatnonzero(made >= SENTINELS[0])
    num_spans = len(marks) // 2
    used = list(SENTINELS[:num_spans])
    assert made[marks].tolist() == used + used
    pieces = [piece.tolist() for piece in np.split(made, marks)]
    around, moved = pieces[:num_spans], pieces[num_spans + 1 :]
    around = [around[0], *(piece[1:] for piece in around[1:])]
    moved = [piece[1:] for piece in moved]
    assert pieces[num_spans] == [used[-1]], "the last span ends the text"
    assert all(around)
    assert all(moved)
    text = [token for pair in zip(around, moved, strict=True) for piece in pair for token in piece]
    assert text == tokens[: length - 2 * num_spans].tolist()


def test_span_share_and_length_are_those_requested() -> None:
    made = [SpanCorruption(SENTINELS, 0.15, 3.0)(np.arange(550), generator(seed)) for seed in range(50)]
    for tokens in made:
        marks = np.flatnonzero(tokens >= SENTINELS[0])
        num_spans, num_kept = len(marks) // 2, 550 - len(marks)
        num_moved = 550 - marks[num_spans] - num_spans
        assert num_moved / num_kept == pytest.approx(0.15, abs=0.01)
        assert num_moved / num_spans == pytest.approx(3.0, abs=0.2)
    assert len({tuple(tokens) for tokens in made}) == 50


@settings(deadline=None)
@given(seeds)
def test_masking_hides_its_share_without_special_tokens(seed: int) -> None:
    tokens = np.tile(np.arange(100), 100)
    made = TokenMasking(MASK, 0.3, kept=(5, 7))(tokens, generator(seed))
    hidden = made == MASK
    assert np.array_equal(made[~hidden], tokens[~hidden])
    assert not np.isin(tokens[hidden], (5, 7)).any()
    assert hidden.sum() == pytest.approx(0.3 * 9800, abs=300)


@pytest.mark.parametrize(
    "transform",
    [
        FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, 0.5),
        SpanCorruption(SENTINELS, 0.15, 3.0),
        TokenMasking(MASK, 0.15),
    ],
)
def test_the_generator_decides_all_inputs_stay_unchanged(transform: Transform) -> None:
    tokens = np.arange(200)
    made = [transform(tokens, generator(seed)).tolist() for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert tokens.tolist() == list(range(200))

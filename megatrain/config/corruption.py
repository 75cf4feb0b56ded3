"""How many tokens of a text span corruption moves, and how long the text is whose source fills a sample.

The lengths are those of T5's `random_spans_noise_mask` (Raffel et al. 2020).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatrain.config.schema import Spans


class Lengths(NamedTuple):
    """How a text is corrupted: tokens that stay, tokens that are moved to the target, and the spans that these are."""

    num_kept: int
    num_moved: int
    num_spans: int

    @property
    def text(self) -> int:
        return self.num_kept + self.num_moved

    @property
    def source(self) -> int:
        """With the sentinels and the end."""
        return self.num_kept + self.num_spans + 1

    @property
    def target(self) -> int:
        return self.num_moved + self.num_spans + 1


def lengths_of(num_tokens: int, corrupted: float, mean_span_tokens: float) -> Lengths:
    """Of a text of ``num_tokens``: of more than one some stay and some are moved; the text begins with what stays."""
    num_moved = min(max(round(num_tokens * corrupted), 1), max(num_tokens - 1, 1))
    num_kept = num_tokens - num_moved
    num_spans = min(max(round(num_moved / mean_span_tokens), 1), num_moved, max(num_kept, 1))
    return Lengths(num_kept, num_moved, num_spans)


def corrupted_lengths(source_len: int, spans: Spans) -> Lengths:
    """Of the longest text whose source has at most ``source_len`` tokens, 3 or more. A source grows with its text by
    at most one token at a time, so it has just as many; but where tokens that stay are as few as spans."""
    corrupted, mean_span_tokens = spans.corrupted, spans.mean_span_tokens
    low, high = 1, 2  # the longest that is known to fit, and one that may be too long
    while lengths_of(high, corrupted, mean_span_tokens).source <= source_len:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = lengths_of(middle, corrupted, mean_span_tokens).source <= source_len
        low, high = (middle, high) if fits else (low, middle)
    return lengths_of(low, corrupted, mean_span_tokens)

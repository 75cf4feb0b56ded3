"""What may be done to a document's tokens as they are read for training: data augmentation.

A transform is a deterministic function of the tokens and of a random generator that depends on the document alone. It
returns as many tokens as it got, so that no sample's length, targets or document boundaries change. What is inserted
(sentinels) replaces the last tokens, which are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import xxhash
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Transform = Callable[[Tokens, np.random.Generator], Tokens]

SHORTEST = 16
"""Shorter parts of documents are not rearranged: too much of them would make room for sentinels."""


def generator_of(text: str, seed: int) -> np.random.Generator:
    """Random numbers that depend on ``text`` and ``seed`` alone: what is read again is transformed alike."""
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(text.encode(), seed)))


@dataclass(frozen=True)
class FillInTheMiddle:
    """The text's middle moved to its end, where it can be predicted from both sides. Three sentinel ids.

    Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022): PSM is <prefix> text before
    <suffix> text behind <middle> middle; SPM, with probability ``spm_rate``, <prefix> <suffix> text behind <middle>
    text before and middle (the variant of their appendix D, which shares PSM's format). Both cuts are uniform.
    """

    prefix: int
    middle: int
    suffix: int
    spm_rate: float

    def __call__(self, tokens: Tokens, random: np.random.Generator) -> Tokens:
        """Rearranged; the last three tokens make room for the sentinels."""
        kept = tokens[:-3]
        before, middle, behind = np.split(kept, np.sort(random.integers(0, len(kept) + 1, size=2)))
        if random.random() < self.spm_rate:
            return np.concatenate([[self.prefix, self.suffix], behind, [self.middle], before, middle])
        return np.concatenate([[self.prefix], before, [self.suffix], behind, [self.middle], middle])


@dataclass(frozen=True)
class SpanCorruption:
    """Spans moved to the end: each leaves a sentinel behind and stands after the same sentinel there.

    Raffel et al., "Exploring the Limits of Transfer Learning" (T5, 2020), with input and output in one sequence, as a
    decoder reads them (Tay et al., "UL2", 2022). ``corrupted``: the share of tokens moved, in spans that are
    ``mean_span_tokens`` long on average; fewer where the ``sentinels`` do not suffice.
    """

    sentinels: tuple[int, ...]
    corrupted: float
    mean_span_tokens: float

    def __call__(self, tokens: Tokens, random: np.random.Generator) -> Tokens:
        """Rearranged; the last two tokens a span make room for its sentinels."""
        spans_per_token = self.corrupted / self.mean_span_tokens
        wanted = max(round(len(tokens) * spans_per_token / (1 + 2 * spans_per_token)), 1)
        num_spans = min(wanted, len(self.sentinels), len(tokens) // 4)
        num_kept = len(tokens) - 2 * num_spans
        share = num_kept * self.corrupted if num_spans == wanted else num_spans * self.mean_span_tokens
        num_moved = min(max(round(share), num_spans), num_kept - num_spans)
        lengths = np.stack(
            [random_parts(num_kept - num_moved, num_spans, random), random_parts(num_moved, num_spans, random)]
        )
        parts = np.split(tokens[:num_kept], np.cumsum(lengths.T.ravel())[:-1])
        marks = [np.array([sentinel]) for sentinel in self.sentinels[:num_spans]]
        around = chain.from_iterable(zip(parts[0::2], marks, strict=True))
        moved = chain.from_iterable(zip(marks, parts[1::2], strict=True))
        return np.concatenate([*around, *moved])


@dataclass(frozen=True)
class TokenMasking:
    """Tokens hidden from the model, which has to predict every one of them all the same: noise on its inputs alone.

    The masking of Devlin et al., "BERT" (2019), as an augmentation: a decoder's targets are unchanged. ``kept``: ids
    that are never hidden.
    """

    mask: int
    rate: float
    kept: tuple[int, ...] = ()

    def __call__(self, tokens: Tokens, random: np.random.Generator) -> Tokens:
        hidden = (random.random(len(tokens)) < self.rate) & ~np.isin(tokens, self.kept)
        return np.where(hidden, self.mask, tokens)


def random_parts(total: int, count: int, random: np.random.Generator) -> Tokens:
    """``count`` positive lengths that add up to ``total``; all such divisions are equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))

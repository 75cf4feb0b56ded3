"""Predicates over a document, each named after the work that it is from. docs/cleaning.md lists them.

A filter gives the reason why a document is to be dropped, or None. Its parameters are its fields, with the values of
that work as defaults; a limit of null switches a rule off. Filters are applied in the order that they are named in, and
the first reason counts. No filter changes a text.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, field_validator

from data_tools.clean.sketch import run_hashes
from data_tools.clean.words import count_sentences, split_words
from megatrain.errors import ConfigError, DataError

BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
SENTENCE_MARKS = (".", "?", "!", '"', "'")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_MARKS = frozenset(
    "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»؟۔।॥၊။።፧‼‽⁇⁈⁉⸮﹒﹖﹗｡։؞܀܁܂߹"
)
"""What does not make a word, beside control characters: the punctuation that datatrove knows."""
_NOT_WORD = frozenset(_MARKS | {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))})
LANGUAGE_CHARACTERS = 10_000
"""Of a document, that tell its language: more make it no surer."""


class Document:
    """A text, and what several filters want to know of it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return split_words(self.text)


class Filter(BaseModel, ABC):
    """Gives the reason why a document is to be dropped, if there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @abstractmethod
    def reason(self, document: Document) -> str | None:
        """Why the document is to be dropped; None if it is not."""


class Length(Filter):
    """Characters of the text. No paper: what is shorter teaches nothing."""

    min_characters: int | None = 1
    max_characters: int | None = None

    def reason(self, document: Document) -> str | None:
        length = len(document.text)
        if self.min_characters is not None and length < self.min_characters:
            return "too short"
        if self.max_characters is not None and length > self.max_characters:
            return "too long"
        return None


class SymbolRatio(Filter):
    """Share of the characters that are no letters, beside white space. StarCoder (Li et al. 2023) keeps 25% letters."""

    max_symbols: float | None = 0.75

    def reason(self, document: Document) -> str | None:
        characters = "".join(document.text.split())
        num_letters = sum(map(str.isalpha, characters))
        if self.max_symbols is not None and characters and 1 - num_letters / len(characters) > self.max_symbols:
            return "too many symbols"
        return None


class Language(Filter):
    """The text's language, by py3langid (Lui and Baldwin 2012, "langid.py"): 140 codes, of ISO 639-1 and 639-3."""

    keep: tuple[str, ...] = ("en",)
    min_probability: float = 0.65

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    @field_validator("keep")
    @classmethod
    def _are_known(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        known = sorted(_language_identifier().labels)
        unknown = [code for code in keep if code not in known]
        if unknown:
            raise ValueError(f"there is no language {unknown[0]!r}; known are {', '.join(known)}")
        return keep

    def reason(self, document: Document) -> str | None:
        if not document.text.strip():
            return "no text"
        language, probability = _language_identifier().classify(document.text[:LANGUAGE_CHARACTERS])
        if language not in self.keep:
            return f"language {language}"
        return "language unsure" if probability < self.min_probability else None


class GopherQuality(Filter):
    """Rae et al. 2021, "Scaling Language Models: ... Gopher", section A1.1, as datatrove reads it."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2

    def reason(self, document: Document) -> str | None:
        words, text, lines = document.words, document.text, document.text.splitlines()
        lengths = [len(word) for word in words if not _NOT_WORD.issuperset(word)]
        if _is_outside(len(lengths), self.min_words, None):
            return "too few words"
        if _is_outside(len(lengths), None, self.max_words):
            return "too many words"
        if not words or not lengths or not lines:
            return None
        if _is_outside(sum(lengths) / len(lengths), self.min_mean_word_length, self.max_mean_word_length):
            return "mean word length"
        if _is_outside(text.count("#") / len(words), None, self.max_hashes_per_word):
            return "too many hash signs"
        if _is_outside(sum(map(text.count, ELLIPSES)) / len(words), None, self.max_ellipses_per_word):
            return "too many ellipses"
        if _is_outside(_share(line.lstrip().startswith(BULLETS) for line in lines), None, self.max_bullet_lines):
            return "too many lines with bullets"
        if _is_outside(_share(line.rstrip().endswith(ELLIPSES) for line in lines), None, self.max_ellipsis_lines):
            return "too many lines that end with an ellipsis"
        if _is_outside(_share(any(map(str.isalpha, word)) for word in words), self.min_alphabetic_words, None):
            return "too few words with letters"
        if _is_outside(len(set(STOP_WORDS).intersection(words)), self.min_stop_words, None):
            return "too few stop words"
        return None


class GopherRepetition(Filter):
    """Rae et al. 2021, table A1, as datatrove reads it: shares of the text that repeat what was there before."""

    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_characters: float | None = 0.2
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_top_ngram: dict[int, float] = {2: 0.2, 3: 0.18, 4: 0.16}
    max_duplicate_ngrams: dict[int, float] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}

    def reason(self, document: Document) -> str | None:
        text = document.text
        if not text:
            return "empty"
        return self._repeated_lines(text) or self._repeated_ngrams(text, document.words)

    def _repeated_lines(self, text: str) -> str | None:
        count, characters = _duplicates(re.split(r"\n{2,}", text.strip()))
        if _is_outside(count, None, self.max_duplicate_paragraphs):
            return "duplicate paragraphs"
        if _is_outside(characters / len(text), None, self.max_duplicate_paragraph_characters):
            return "characters in duplicate paragraphs"
        count, characters = _duplicates(re.split(r"\n+", text))
        if _is_outside(count, None, self.max_duplicate_lines):
            return "duplicate lines"
        if _is_outside(characters / len(text), None, self.max_duplicate_line_characters):
            return "characters in duplicate lines"
        return None

    def _repeated_ngrams(self, text: str, words: Sequence[str]) -> str | None:
        numbers: dict[str, int] = {}
        word_numbers = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.uint64)
        ends = np.cumsum([0, *map(len, words)])
        for n, limit in self.max_top_ngram.items():
            if _top_ngram_characters(run_hashes(word_numbers, n), ends, n) / len(text) > limit:
                return f"most frequent {n}-gram"
        for n, limit in self.max_duplicate_ngrams.items():
            if _duplicate_ngram_characters(run_hashes(word_numbers, n), ends, n) / len(text) > limit:
                return f"characters in duplicate {n}-grams"
        return None


class C4Quality(Filter):
    """Raffel et al. 2020, section 2.2, as datatrove reads it: a text is judged by those of its lines that C4 keeps."""

    min_sentences: int | None = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    drop_curly_brackets: bool = True
    drop_lorem_ipsum: bool = True

    def reason(self, document: Document) -> str | None:
        num_sentences = 0
        for line in document.text.splitlines():
            words = line.split()
            if any(len(word) > self.max_word_length for word in words):
                continue
            stripped = _CITATION.sub("", line.strip())
            if (
                not stripped.endswith(SENTENCE_MARKS)
                or stripped.endswith("...")
                or len(words) < self.min_words_per_line
            ):
                continue
            lowered = stripped.lower()
            if self.drop_lorem_ipsum and "lorem ipsum" in lowered:
                return "lorem ipsum"
            if "javascript" in lowered:
                continue
            if self.drop_curly_brackets and "{" in stripped:
                return "curly bracket"
            if not any(phrase in lowered for phrase in POLICY_PHRASES):
                num_sentences += count_sentences(stripped)
        return "too few sentences" if _is_outside(num_sentences, self.min_sentences, None) else None


FILTERS: dict[str, type[Filter]] = {
    "length": Length,
    "symbol_ratio": SymbolRatio,
    "language": Language,
    "gopher_quality": GopherQuality,
    "gopher_repetition": GopherRepetition,
    "c4_quality": C4Quality,
}


class OwnFilter(Filter):
    """A user's own function `module:function`. It is called with the text, and the parameters by name.

    It returns True for a text that stays, False for one that does not, or the reason why it does not.
    """

    function: str
    parameters: dict[str, Any]
    digest: str
    """Of the module's source: by another function, a result would be another."""

    def reason(self, document: Document) -> str | None:
        answer = find_function(self.function)(document.text, **self.parameters)
        if not isinstance(answer, bool | str):
            raise DataError(
                f"The filter {self.function} returned {answer!r:.80}. It should return True for a text that stays, "
                "False for one that does not, or the reason why it does not."
            )
        return (answer or None) if isinstance(answer, str) else None if answer else "dropped"


def own_filter(name: str, parameters: object) -> OwnFilter:
    """Raises ConfigError where there is no such function, or it does not take such parameters."""
    if parameters is not None and not isinstance(parameters, dict):
        raise ConfigError(f"{name}: its parameters should be keys with values, got {parameters!r}.")
    function = find_function(name)
    try:
        inspect.signature(function).bind("text", **(parameters or {}))
    except TypeError as error:
        raise ConfigError(f"The filter {name} cannot be called with a text and its parameters: {error}.") from None
    source = Path(inspect.getsourcefile(function) or "").read_bytes()
    digest = hashlib.sha256(source).hexdigest()[:32]
    return OwnFilter(function=name, parameters=parameters or {}, digest=digest)


@cache
def find_function(name: str) -> Callable[..., object]:
    """The function `module:function`; modules of the working folder are found too."""
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The filter {name} cannot be found: {error}. It is a function of a module in {folder}, "
            "or of one that is installed."
        ) from None
    if not inspect.isfunction(function):
        raise ConfigError(f"The filter {name} is no function but {function!r:.80}.")
    return function


@lru_cache(maxsize=1)
def _language_identifier() -> Any:
    """Takes a second to load, once in each process that needs it."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _is_outside(value: float, low: float | None, high: float | None) -> bool:
    return (low is not None and value < low) or (high is not None and value > high)


def _share(found: Iterable[bool]) -> float:
    values = list(found)
    return sum(values) / len(values)


def _duplicates(pieces: list[str]) -> tuple[float, int]:
    """The share of pieces that came before, and their characters."""
    repeats = [(count - 1, len(piece)) for piece, count in Counter(pieces).items()]
    return sum(count for count, _ in repeats) / len(pieces), sum(count * length for count, length in repeats)


def _top_ngram_characters(hashes: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64], n: int) -> int:
    """Characters of the most frequent n-gram, with a space between words, times how often it comes."""
    if len(hashes) == 0:
        return 0
    _, firsts, counts = np.unique(hashes, return_index=True, return_counts=True)
    first = int(firsts[counts == counts.max()].min())
    return int((ends[first + n] - ends[first] + n - 1) * counts.max())


def _duplicate_ngram_characters(hashes: npt.NDArray[np.uint64], ends: npt.NDArray[np.int64], n: int) -> int:
    """Characters of n-grams that came before, each counted once: behind a repeated one, reading goes on after it."""
    if len(np.unique(hashes)) == len(hashes):
        return 0
    seen: set[int] = set()
    characters = place = 0
    values = hashes.tolist()
    while place < len(values):
        if values[place] in seen:
            characters += int(ends[place + n] - ends[place])
            place += n
        else:
            seen.add(values[place])
            place += 1
    return characters

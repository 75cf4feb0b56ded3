"""Supervised fine-tuning: examples of which answers alone are scored, and which of their tokens these are.

A token is scored if any of its characters is: transformers' own masks have the same rule. The tokens of an example are
those of its whole text, encoded once; scored is what lies in the answers' characters, whatever ids there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from data_tools.tokenizer import TokenizerFile
from data_tools.units import Fields, ReadOptions, Record
from megatrain.errors import ConfigError

Spans = tuple[tuple[int, int], ...]


class Example(NamedTuple):
    """A text, and which of it is scored."""

    text: str
    id: str | None
    file: int
    """Index in the unit's files."""
    scored: Spans
    """Runs of characters, [begin, end), ascending."""
    scores_end: bool
    """Whether the end-of-document token is scored, where the text does not end with one of its own."""


class LeftOut(NamedTuple):
    """Why a record makes no example."""

    reason: str
    """A key of `Manifest.examples`."""
    problem: str


class Supervision(Protocol):
    """Makes examples of records."""

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def named(self) -> dict[str, str]:
        """What of it decides the tokens, for `Manifest.options`."""
        ...

    def examples(self, record: Record) -> Iterator[Example | LeftOut]: ...


@dataclass(frozen=True)
class PromptAndAnswer:
    """A prompt and its answer as they are, one behind the other. Scored: the answer, and the end of the document."""

    max_tokens: int | None = None

    @property
    def named(self) -> dict[str, str]:
        return {"format": "prompt_answer", **max_tokens_named(self.max_tokens)}

    def examples(self, record: Record) -> Iterator[Example | LeftOut]:
        prompt, answer = orjson.loads(record.text)
        if not isinstance(answer, str) or not answer:
            yield LeftOut("no_answer", "the record has no answer")
        elif not prompt:
            yield LeftOut("no_prompt", "the prompt is empty: all would be scored")
        else:
            text = prompt + answer
            yield Example(text, record.id, record.file, ((len(prompt), len(text)),), scores_end=True)


def choose_supervision(
    read: ReadOptions, prompt_key: str | None, answer_key: str | None, max_tokens: int | None
) -> tuple[ReadOptions, PromptAndAnswer | None]:
    """What to read, and what to make of it, by the options of `tokenize`. Raises ConfigError where they do not fit."""
    if prompt_key is None and answer_key is None:
        if max_tokens is not None:
            raise ConfigError("--max-tokens would do nothing: plain documents are cut as they are read for training.")
        return read, None
    if prompt_key is None or answer_key is None:
        raise ConfigError("--prompt-key and --answer-key belong together: give both.")
    fields = Fields((answer_key,), is_chat=False, option="--prompt-key")
    return replace(read, text_key=prompt_key, fields=fields), PromptAndAnswer(max_tokens)


def max_tokens_named(max_tokens: int | None) -> dict[str, str]:
    return {} if max_tokens is None else {"max_tokens": str(max_tokens)}


class Encoded(NamedTuple):
    """A document: its ids, and the runs of tokens that are scored."""

    ids: npt.NDArray[np.uint32]
    scored: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class ExampleEncoder:
    """Examples into documents of at most ``max_tokens`` (None: of any length)."""

    tokenizer: TokenizerFile
    max_tokens: int | None = None

    def encode(self, examples: Sequence[Example], counts: Counter[str]) -> list[Encoded | None]:
        """The document of each; None where no answer is left of it. ``counts``: see `Manifest.examples`."""
        encodings = self._library.encode_batch([example.text for example in examples], add_special_tokens=False)
        return [self._document(*pair, counts) for pair in zip(examples, encodings, strict=True)]

    def _document(self, example: Example, encoding: Any, counts: Counter[str]) -> Encoded | None:
        ids = np.array(encoding.ids, np.uint32)
        mask = overlapping(np.array(encoding.offsets, np.int64).reshape(-1, 2), example.scored)
        bos_id, eod_id = self.tokenizer.bos_id, self.tokenizer.eod_id
        if bos_id is not None and ids[:1] != [bos_id]:
            ids, mask = np.insert(ids, 0, bos_id), np.insert(mask, 0, False)
        if ids[-1:] != [eod_id]:
            ids, mask = np.append(ids, np.uint32(eod_id)), np.append(mask, example.scores_end)
        runs = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        if self.max_tokens is None or len(ids) <= self.max_tokens:
            return Encoded(ids, runs.astype(np.uint32))
        return self._cut(ids, runs, counts)

    def _cut(self, ids: npt.NDArray[np.uint32], runs: npt.NDArray[np.int64], counts: Counter[str]) -> Encoded | None:
        """A document that is too long up to the last answer that fits as a whole, and the end of the document."""
        eod_id = self.tokenizer.eod_id
        ends = runs[1::2]
        fitting = ends[ends + (ids[ends - 1] != eod_id) <= (self.max_tokens or 0)]
        if not len(fitting):
            counts["no_answer_left"] += 1
            counts["dropped_tokens"] += len(ids)
            return None
        counts["cut_answers" if len(fitting) < len(ends) else "cut_prompts"] += 1
        end = fitting[-1]
        kept = ids[:end] if ids[end - 1] == eod_id else np.append(ids[:end], np.uint32(eod_id))
        counts["dropped_tokens"] += len(ids) - len(kept)
        return Encoded(kept, runs[runs <= end].astype(np.uint32)[: 2 * len(fitting)])

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer

        # A post-processor only adds tokens, and leaves white space out of the offsets.
        return Tokenizer.from_buffer(orjson.dumps({**orjson.loads(self.tokenizer.text_json), "post_processor": None}))


def overlapping(tokens: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which of these tokens, [begin, end) in characters, have a character of a span; empty ones have the next one."""
    bounds = np.array(list(spans), np.int64).reshape(-1, 2)
    begins, ends = tokens[:, 0], np.maximum(tokens[:, 1], tokens[:, 0] + 1)
    begun = bounds[:, 0].searchsorted(ends, side="left")
    ended = bounds[:, 1].searchsorted(begins, side="right")
    overlaps: npt.NDArray[np.bool_] = begun > ended
    return overlaps

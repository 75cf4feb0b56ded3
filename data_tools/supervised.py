"""Supervised fine-tuning: examples of which answers alone are scored, and which of their tokens these are.

A token is scored if any of its characters is: transformers' own masks have the same rule. The tokens of an example are
those of its whole text, encoded once; scored is what lies in the answers' characters, whatever ids there are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from data_tools.engines import cannot_encode
from data_tools.tokenizer import TokenizerFile
from data_tools.units import Record
from megatrain.data.format import SCORED, Manifest
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import DataError

Spans = tuple[tuple[int, int], ...]


class Example(NamedTuple):
    """A text, and which of it is scored."""

    text: str
    id: str | None
    file: int
    """Index in the unit's files."""
    scored: Spans
    """Runs of characters, [begin, end), ascending."""
    literal: Spans
    """Runs of characters that stay text even if they spell control tokens."""
    scores_end: bool
    """Whether the end-of-document token is scored, where the text does not end with one of its own."""
    label: str | None = None
    """Of a text that is classified: nothing of it is scored."""


class LeftOut(NamedTuple):
    """Why a record makes no example."""

    reason: str
    """A key of `Manifest.examples`."""
    problem: str


class Supervision(Protocol):
    """Makes examples of records."""

    @property
    def column(self) -> pa.Field:
        """What shards have beside the tokens: SCORED or LABEL."""
        ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def named(self) -> dict[str, str]:
        """What of it decides the tokens, for `Manifest.options`."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """Of TEMPLATE_FILES, those that belong to the dataset."""
        ...

    @property
    def target_tokenizer(self) -> TokenizerFile | None:
        """That of what is scored, where it has one of its own."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user should know before the work begins."""
        ...

    def examples(self, record: Record, counts: Counter[str]) -> Iterator[Example | LeftOut]:
        """Those of a record, and why there are none; ``counts``: see `Manifest.examples`."""
        ...


class _TwoTexts:
    """Of two texts in a record; nothing beside them belongs to the dataset."""

    examples_name: ClassVar[str]
    column: ClassVar[pa.Field] = SCORED
    max_tokens: int | None
    target_tokenizer: TokenizerFile | None = None

    @property
    def named(self) -> dict[str, str]:
        return {"examples": self.examples_name, **max_tokens_named(self.max_tokens)}

    @property
    def files(self) -> Mapping[str, bytes]:
        return {}

    @property
    def notes(self) -> list[str]:
        return []


@dataclass(frozen=True)
class PromptAndAnswer(_TwoTexts):
    """A prompt and its answer as they are, one behind the other. Scored: the answer, and the end of the document."""

    examples_name = "prompt_answer"
    max_tokens: int | None = None

    def examples(self, record: Record, counts: Counter[str]) -> Iterator[Example | LeftOut]:
        prompt, answer = orjson.loads(record.text)
        if not isinstance(answer, str) or not answer:
            yield LeftOut("no_answer", "the record has no answer")
        elif not prompt:
            yield LeftOut("no_prompt", "the prompt is empty: all would be scored")
        else:
            text = prompt + answer
            yield Example(text, record.id, record.file, ((len(prompt), len(text)),), ((0, len(text)),), scores_end=True)


@dataclass(frozen=True)
class SourceAndTarget(_TwoTexts):
    """A source and its target, for an encoder-decoder model: both end with ``eod_token``, and each is encoded by
    itself, the target by ``target_tokenizer`` where it has one of its own. Scored: the target."""

    examples_name = "source_target"
    eod_token: str
    max_tokens: int | None = None
    target_tokenizer: TokenizerFile | None = None

    @property
    def named(self) -> dict[str, str]:
        target = self.target_tokenizer
        return super().named | ({} if target is None else {"target_tokenizer_sha256": target.sha256})

    def examples(self, record: Record, counts: Counter[str]) -> Iterator[Example | LeftOut]:
        source, target = orjson.loads(record.text)
        if not isinstance(target, str) or not target:
            yield LeftOut("no_answer", "the record has no target")
        elif not source:
            yield LeftOut("no_prompt", "the source is empty")
        else:
            text = f"{source}{self.eod_token}{target}"
            begin = len(text) - len(target)
            literal = ((0, len(source)), (begin, len(text)))
            yield Example(text, record.id, record.file, ((begin, len(text)),), literal, scores_end=True)


def max_tokens_named(max_tokens: int | None) -> dict[str, str]:
    return {} if max_tokens is None else {"max_tokens": str(max_tokens)}


def describe_counts(counts: Mapping[str, int]) -> str:
    """`Manifest.examples` in words."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))


def describe_scored(manifest: Manifest) -> str:
    """How much of a dataset is scored, and what was left out of it."""
    scored = f"{manifest.num_scored} tokens ({scored_percent(manifest):.1f}%)"
    return f"Scored: {scored}. Examples: {describe_counts(manifest.examples or {})}."


def scored_percent(manifest: Manifest) -> float:
    return 100 * (manifest.num_scored or 0) / manifest.num_tokens


def nothing_left_error(column: pa.Field, counts: Mapping[str, int], skipped: bytes) -> DataError:
    """For an input of which no example is left; ``skipped``: what SKIPPED_FILE would list."""
    first = skipped.partition(b"\n")[0]
    why = "row {row} of {file}: {problem}".format(**orjson.loads(first)) if first else "give a larger --max-tokens"
    what = "answer of the input is left to be scored" if column is SCORED else "text of the input has a label"
    return DataError(f"No {what} ({describe_counts(counts)}): {why}.")


class Encoded(NamedTuple):
    """A document: its ids, the runs of tokens that are scored, the UTF-8 bytes of its text, and its label."""

    ids: npt.NDArray[np.uint32]
    scored: npt.NDArray[np.uint32]
    text_bytes: int
    label: str | None = None


@dataclass(frozen=True)
class ExampleEncoder:
    """Examples into documents of at most ``max_tokens`` (None: of any length)."""

    tokenizer: TokenizerFile
    max_tokens: int | None = None

    def encode(self, examples: Sequence[Example], counts: Counter[str]) -> list[Encoded | None]:
        """The document of each; None where no answer is left of it. ``counts``: see `Manifest.examples`."""
        found: list[Encoded | None] = [None] * len(examples)
        for is_literal, library in ((False, self._library), (True, self._text_library)):
            chosen = [number for number, example in enumerate(examples) if bool(example.literal) == is_literal]
            given = [examples[n] if not is_literal else self._disguised(examples[n]) for n in chosen]
            try:
                encodings = library.encode_batch([example.text for example in given], add_special_tokens=False)
            except Exception as error:  # noqa: BLE001 (plain Exception)
                raise cannot_encode(error) from None
            for number, example, encoding in zip(chosen, given, encodings, strict=True):
                found[number] = self._document(example, encoding, counts)
        return found

    def _document(self, example: Example, encoding: Any, counts: Counter[str]) -> Encoded | None:
        ids = np.array(encoding.ids, np.uint32)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        mask = overlapping(places, example.scored)
        if not (mask.any() if example.label is None else len(ids)):  # the tokenizer has no tokens for it
            counts["no_answer" if example.label is None else "no_text"] += 1
            return None
        begins = np.array([begin for begin, _ in example.scored], np.int64)
        first = places[:, 1].searchsorted(begins, side="right")  # the token that holds the first scored character
        counts["tokens_across_borders"] += int((places[np.minimum(first, len(places) - 1), 0] < begins).sum())
        bos_id, eod_id = self.tokenizer.bos_id, self.tokenizer.eod_id
        shift = 0
        if bos_id is not None and ids[0] != bos_id:
            ids, mask, shift = np.insert(ids, 0, bos_id), np.insert(mask, 0, False), 1
        if ids[-1] != eod_id:
            ids, mask = np.append(ids, np.uint32(eod_id)), np.append(mask, example.scores_end)
        runs = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        text = example.text
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            end = self._cut(ids, runs, counts)
            if not end:
                return None
            text = text[: places[end - 1 - shift, 1]]
            ids = ids[:end] if ids[end - 1] == eod_id else np.append(ids[:end], np.uint32(eod_id))
            runs = runs[: 2 * int((runs[1::2] <= end).sum())]
        for token, name in self._hidden.items() if example.literal else ():
            text = text.replace(name, token)
        return Encoded(ids, runs.astype(np.uint32), len(text.encode()), example.label)

    def _cut(self, ids: npt.NDArray[np.uint32], runs: npt.NDArray[np.int64], counts: Counter[str]) -> int:
        """Where a document that is too long ends: behind the last answer that fits as a whole; 0 if none does."""
        ends = runs[1::2]
        is_closed = ids[ends - 1] == self.tokenizer.eod_id
        fitting = np.flatnonzero(ends + ~is_closed <= (self.max_tokens or 0))
        last = int(fitting[-1]) if len(fitting) else -1
        end = int(ends[last]) if last >= 0 else 0
        reason = "no_answer_left" if last < 0 else "cut_answers" if last < len(ends) - 1 else "cut_prompts"
        counts[reason] += 1
        counts["dropped_tokens"] += len(ids) - (end + int(not is_closed[last]) if end else 0)
        return end

    def _disguised(self, example: Example) -> Example:
        """The text with the names that control tokens have for the text library, but for what is literal."""
        edits = []
        literal = iter([*example.literal, (len(example.text), len(example.text))])
        begin, end = next(literal)
        for found in self._control.finditer(example.text):
            while end <= found.start() and end < len(example.text):
                begin, end = next(literal)
            if not begin <= found.start() < end:
                edits.append((*found.span(), self._hidden[found[0]]))
        text, scored = replaced(example.text, edits, example.scored)
        return example._replace(text=text, scored=scored)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.tokenizer.control, key=len, reverse=True))))

    @cached_property
    def _hidden(self) -> dict[str, str]:
        """The name of each control token in the tokenizer for text, where it has another."""
        ids = self._library.get_vocab(with_added_tokens=True)
        return {token: self._text_library.id_to_token(ids[token]) for token in self.tokenizer.control}

    @cached_property
    def _library(self) -> Any:
        return _without_post_processor(self.tokenizer.json)

    @cached_property
    def _text_library(self) -> Any:
        return _without_post_processor(self.tokenizer.text_json)


@dataclass(frozen=True)
class PairEncoder:
    """Sources and targets that have a tokenizer each into documents. A pair of more than ``max_tokens`` is left out."""

    source: TokenizerFile
    target: TokenizerFile
    max_tokens: int | None = None

    def encode(self, examples: Sequence[Example], counts: Counter[str]) -> list[Encoded | None]:
        """As ExampleEncoder does."""
        texts = [self.sides(example) for example in examples]
        sides = zip(*texts, strict=True) if texts else ((), ())
        encoded = (self._ids(library, side) for library, side in zip(self._libraries, sides, strict=True))
        return [
            self._document(source, target, sum(len(text.encode()) for text in pair), counts)
            for source, target, pair in zip(*encoded, texts, strict=True)
        ]

    @staticmethod
    def sides(example: Example) -> tuple[str, str]:
        """Its two texts."""
        source, target = (example.text[begin:end] for begin, end in example.literal)
        return source, target

    def split(self, document: Encoded) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """The ids of its two texts, without what ends them."""
        begin = int(document.scored[0])
        return document.ids[int(self.source.bos_id is not None) : begin - 1], document.ids[begin:-1]

    def _document(
        self, source: Sequence[int], target: Sequence[int], text_bytes: int, counts: Counter[str]
    ) -> Encoded | None:
        begins = [] if self.source.bos_id is None else [self.source.bos_id]
        before, after = [*begins, *source, self.source.eod_id], [*target, self.target.eod_id]
        num_tokens = len(before) + len(after)
        if not (source and target):  # a tokenizer has no tokens for it
            counts["no_answer"] += 1
            return None
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            counts["no_answer_left"] += 1
            counts["dropped_tokens"] += num_tokens
            return None
        return Encoded(
            np.array([*before, *after], np.uint32), np.array([len(before), num_tokens], np.uint32), text_bytes
        )

    @cached_property
    def _libraries(self) -> tuple[Any, Any]:
        return _without_post_processor(self.source.text_json), _without_post_processor(self.target.text_json)

    @staticmethod
    def _ids(library: Any, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [each.ids for each in library.encode_batch(list(texts), add_special_tokens=False)]
        except Exception as error:  # noqa: BLE001 (plain Exception)
            raise cannot_encode(error) from None


def _without_post_processor(tokenizer_json: bytes) -> Any:
    """A post-processor only adds tokens, and may leave white space out of the offsets."""
    from tokenizers import Tokenizer as Library

    description = Tokenizer(tokenizer_json, "the tokenizer").description
    return Library.from_buffer(orjson.dumps({**description, "post_processor": None}))


def replaced(text: str, edits: Sequence[tuple[int, int, str]], spans: Sequence[tuple[int, int]]) -> tuple[str, Spans]:
    """The text with each [begin, end) replaced by another, and spans, whose bounds lie in none of these, in it."""
    pieces, position = [], 0
    for begin, end, other in edits:
        pieces += [text[position:begin], other]
        position = end
    ends = [end for _, end, _ in edits]
    grown = [0, *accumulate(len(other) - (end - begin) for begin, end, other in edits)]
    moved = tuple((a + grown[bisect_right(ends, a)], b + grown[bisect_right(ends, b)]) for a, b in spans)
    return "".join([*pieces, text[position:]]), moved


def overlapping(tokens: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Which of these tokens, [begin, end) in characters, have a character of a span; empty ones have the next one."""
    bounds = np.array(list(spans), np.int64).reshape(-1, 2)
    begins, ends = tokens[:, 0], np.maximum(tokens[:, 1], tokens[:, 0] + 1)
    begun = bounds[:, 0].searchsorted(ends, side="left")
    ended = bounds[:, 1].searchsorted(begins, side="right")
    overlaps: npt.NDArray[np.bool_] = begun > ended
    return overlaps

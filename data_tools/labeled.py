"""Texts with labels, for classification: a label of each text, or of two texts together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import orjson
import pyarrow as pa

from data_tools.supervised import Example, LeftOut
from data_tools.units import Record
from megatrain.data.format import LABEL, LABELED_PAIRS, checksum
from megatrain.errors import DataError

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?")


@dataclass(frozen=True)
class LabeledText:
    """A text and its label: text, a number or a boolean. ``names``: of the labels, in their order; None: all that there
    are, sorted. ``eod_token``: ends the first of two texts, where ``has_pairs``."""

    eod_token: str
    has_pairs: bool = False
    names: tuple[str, ...] | None = None
    column: ClassVar[pa.Field] = LABEL
    max_tokens: ClassVar[None] = None
    target_tokenizer: ClassVar[None] = None
    files: ClassVar[Mapping[str, bytes]] = {}
    notes: ClassVar[list[str]] = []

    @property
    def named(self) -> dict[str, str]:
        given = {} if self.names is None else {"label_names": checksum("\n".join(self.names).encode()).hex()}
        return {"examples": LABELED_PAIRS if self.has_pairs else "labeled", **given}

    def names_of(self, found: Iterable[str]) -> list[str]:
        """The labels' names by number, where these were found: numbers are sorted as such, of equal ones by text."""
        if self.names is not None:
            return list(self.names)
        names = sorted(set(found))
        return sorted(names, key=float) if all(map(_NUMBER.fullmatch, names)) else names

    def refuse_few(self, found: Iterable[str]) -> None:
        """Raise DataError for the only label of an input: what is classified has two or more."""
        if len(names := self.names_of(found)) == 1:
            raise DataError(
                f"All texts have the label {names[0]!r:.60}, and what is classified has two or more. Give the names of "
                "all labels, one a line in their order, in a file: --label-names FILE."
            )

    def examples(self, record: Record, counts: Counter[str]) -> Iterator[Example | LeftOut]:
        first, label, *second = orjson.loads(record.text)
        texts = [first, *second]
        if not isinstance(label, str | int | float) or label == "":
            yield LeftOut("no_label", "the record has no label")
        elif self.names is not None and str(label) not in self.names:
            yield LeftOut("unknown_label", f"the label {str(label)!r:.60} is none of --label-names")
        elif not all(isinstance(text, str) and text for text in texts):
            yield LeftOut("no_text", "a text is empty, or is none")
        else:
            ends = [len(self.eod_token) * number + len("".join(texts[: number + 1])) for number in range(len(texts))]
            literal = tuple((end - len(text), end) for end, text in zip(ends, texts, strict=True))
            whole = self.eod_token.join(texts)
            yield Example(whole, record.id, record.file, (), literal, scores_end=False, label=str(label))

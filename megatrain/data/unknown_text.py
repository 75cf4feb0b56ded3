"""What of a text a tokenizer has no tokens for: it becomes unknown tokens, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatrain.data.format import Unknown
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import DataError

EXAMPLE_CHARACTERS = 20


def refuse_above(share: float, unknown: Unknown, what: str) -> None:
    if unknown.share > share:
        raise DataError(
            f"The tokenizer has no tokens for too much of {what}: {unknown}. Use one that knows this text (one with "
            "tokens for all bytes knows any), or say with --max-unknown which share may be lost."
        )


class UnknownText:
    """Counts what a tokenizer has no tokens for.

    Whether a character has a token is asked once for each that comes up. BPE builds on single characters, so that is
    all there is to it. The other models know words, or pieces of them: there, documents with unknown tokens are
    encoded again, for the places of these tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unknown_id = -1 if tokenizer.unknown is None else tokenizer.ids[tokenizer.unknown]
        self._known: set[str] = set()
        self._strange: set[str] = set()

    def count(
        self, texts: Sequence[str], ids: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], names: Sequence[str]
    ) -> Unknown:
        """Of texts and their ids end to end; ``offsets``: where each text's ids begin; ``names``: for the example."""
        characters: set[str] = set().union(*texts)
        for character in characters - self._known - self._strange:
            (self._known if self._tokenizer.knows(character) else self._strange).add(character)
        strange = characters & self._strange
        num_unknown = np.diff(np.concatenate([[0], np.cumsum(ids == self._unknown_id)])[offsets])
        total = Unknown(of_characters=sum(map(len, texts)))
        for text, tokens, name in zip(texts, num_unknown.tolist(), names, strict=True):
            if tokens or not strange.isdisjoint(text):
                total += self._of_text(text, tokens, strange, name)
        return total

    def _of_text(self, text: str, tokens: int, strange: set[str], name: str) -> Unknown:
        places = {place for place, character in enumerate(text) if character in strange}
        if tokens and not self._tokenizer.is_plain_bpe:
            for begin, end in self._tokenizer.unknown_spans(text):
                places.update(range(begin, end))
        first = min(places, default=0)
        example = f"{text[first : first + EXAMPLE_CHARACTERS]!r} in {name}"
        return Unknown(tokens, len(places), 0, example)

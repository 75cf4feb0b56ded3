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

    Whether a character has a token is looked up once for each that occurs. That is enough for BPE, which builds on
    single characters. The other models build on words or parts of words: there, documents with unknown tokens are
    encoded again, for the positions of these tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unknown_id = -1 if tokenizer.unknown is None else tokenizer.ids[tokenizer.unknown]
        self._has_token: dict[str, bool] = {}

    def count(
        self, texts: Sequence[str], ids: npt.NDArray[np.uint32], offsets: npt.NDArray[np.int64], names: Sequence[str]
    ) -> Unknown:
        """Of texts and their ids end to end; ``offsets``: where each text's ids begin; ``names``: for the example."""
        characters: set[str] = set().union(*texts)
        for character in characters - self._has_token.keys():
            self._has_token[character] = self._tokenizer.knows(character)
        unknown = {character for character in characters if not self._has_token[character]}
        num_unknown = np.diff(np.concatenate([[0], np.cumsum(ids == self._unknown_id)])[offsets])
        total = Unknown(of_characters=sum(map(len, texts)))
        for text, tokens, name in zip(texts, num_unknown.tolist(), names, strict=True):
            if tokens or not unknown.isdisjoint(text):
                total += self._of_text(text, tokens, unknown, name)
        return total

    def _of_text(self, text: str, tokens: int, unknown: set[str], name: str) -> Unknown:
        positions = {position for position, character in enumerate(text) if character in unknown}
        if tokens and not self._tokenizer.is_plain_bpe:
            for begin, end in self._tokenizer.unknown_spans(text):
                positions.update(range(begin, end))
        first = min(positions, default=0)
        example = f"{text[first : first + EXAMPLE_CHARACTERS]!r} in {name}"
        return Unknown(tokens, len(positions), 0, example)

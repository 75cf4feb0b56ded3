"""Which tokens continue a word, by how the tokenizer's vocabulary is spelled: a dataset has ids alone; no torch.

No word of the tokenizer's own (`Encoding.word_ids`) is parted here, whichever of the usual patterns it splits text by.
A word may be longer: signs are kept with the letters behind them, as in Llama 3's pattern, and not with those before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatrain.data.tokenizer import Tokenizer

_LETTER, _SIGN, _SPACE, _NEWLINE, _BYTE = range(5)
_CONTINUES = np.array(
    [  # a letter, a sign, a space, a line's end, a byte beyond ASCII
        [1, 0, 0, 0, 1],  # after a letter
        [1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ],
    dtype=np.bool_,
)
_METASPACE = "\u2581"
_SPACES, _NEWLINES = "\u0120\u0109", "\u010a\u010d"
"""How a byte-level vocabulary spells a space and a tabulator; the ends of a line."""


class Words:
    """Of each id of a tokenizer how it begins and ends, and whether it begins a word wherever it stands: with a space
    before other text, or in a vocabulary that marks what continues a word without such a mark."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        model = tokenizer.description["model"]
        prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
        self._first, self._last = np.full((2, vocab_size), _LETTER, dtype=np.int8)
        self._begins = np.zeros(vocab_size, dtype=np.bool_)
        for token, number in tokenizer.ids.items():
            if number >= vocab_size:
                continue
            if token in tokenizer.control or model["type"] == "WordLevel":
                self._begins[number] = True
            elif prefix:
                self._begins[number] = not token.startswith(prefix)
            elif suffix:  # nothing but a line's end continues a line's end
                self._last[number] = _NEWLINE if token.endswith(suffix) else _LETTER
            elif tokenizer.is_byte_level:
                kinds = [_kind(character) for character in token]
                self._first[number], self._last[number] = kinds[0], kinds[-1]
                self._begins[number] = kinds[0] == _SPACE and kinds.count(_SPACE) < len(kinds)
            else:
                self._begins[number] = token.startswith(_METASPACE)

    def continues(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Of each token but the first, whether it continues the word that the one before it belongs to."""
        is_joined = _CONTINUES[self._last[tokens[:-1]], self._first[tokens[1:]]]
        return np.asarray(is_joined & ~self._begins[tokens[1:]])


def _kind(character: str) -> int:
    """Of a byte that a byte-level vocabulary spells as this character."""
    if ord(character) < 0x80:
        return _LETTER if character.isalnum() else _SIGN
    if character in _SPACES:
        return _SPACE
    return _NEWLINE if character in _NEWLINES else _BYTE

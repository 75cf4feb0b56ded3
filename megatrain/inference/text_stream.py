"""Text from token ids that come one by one: each character as soon as it is whole, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megatrain.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class TextStream:
    """What follows a prompt, decoded piece by piece; the pieces joined are the decoded whole without the prompt.

    A piece is decoded together with the piece before it, as a decoder may drop the space in front of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        """``stops``: texts that end what is generated, and are left out."""
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids, self._next = list(prompt), len(prompt)
        self._shown = tokenizer.decode(self._ids)
        self._held_back = ""
        self.has_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # Of a run of byte tokens a decoder makes nothing of what came before, if it is no text in the end.
        if self._tokenizer.is_byte(token):
            return ""
        # A character's bytes may be spread over several tokens: the last one may still become another.
        certain = text.removesuffix(REPLACEMENT)
        piece, self._shown = certain[len(self._shown) :], certain
        if certain == text and piece:
            self._ids, self._next = self._ids[self._next :], len(self._ids) - self._next
            self._shown = self._tokenizer.decode(self._ids)
        return self._before_stops(piece)

    def end(self) -> str:
        """The rest, where no more tokens come."""
        rest = self._tokenizer.decode(self._ids)[len(self._shown) :]
        piece = self._before_stops(rest) + self._held_back
        self._held_back = ""
        return piece

    def _before_stops(self, piece: str) -> str:
        """The piece with what was held back before it, up to a stop; what may be the beginning of one is held back."""
        text = self._held_back + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.has_stopped, self._held_back = True, ""
            return text[: min(found)]
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held_back = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the first of ``stop``."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)

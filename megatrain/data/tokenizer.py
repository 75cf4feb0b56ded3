"""The one reader of tokenizers: a tokenizer.json, as the data tools, training, evaluation and generation use it."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatrain.data.format import TOKENIZER_FILE
from megatrain.errors import DataError, MegatrainError

_PAD = "<pad>"
_CONTROL_LIKE = re.compile(r"▁?<\S*\w\S*>")
"""Added tokens that are control tokens although the file does not call them special: <tool_call>, <|fim_prefix|>."""
_CONTROL_NAMES = re.compile(r"</?s>|<\|\w+\|>|<(pad|unk|mask|bos|eos|cls|sep)>|\[(PAD|UNK|MASK|BOS|EOS|CLS|SEP)\]")
"""What SentencePiece, BERT and their like call control tokens, which files may have in the model's vocabulary alone."""
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_KEEPING_TEXT = frozenset(
    {
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "ByteLevel", "Sequence"),
        *("Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation"),
    }
)
"""Types of normalizers and pre-tokenizers that leave no text out, unless they replace it by nothing or remove it."""


class Tokenizer:
    """A tokenizer.json in use: truncation, padding and dropout, which the file may ask for, are switched off."""

    def __init__(self, data: bytes, name: object, error: type[MegatrainError] = DataError, advice: str = "") -> None:
        """Read the bytes of a tokenizer.json, called ``name``. Raises ``error``, with advice, where they are none."""
        from tokenizers import Tokenizer as Library

        self.json = data
        self.name = str(name)
        try:
            self._library = Library.from_buffer(data)
        except Exception as problem:  # noqa: BLE001 (the library raises plain Exception for whatever is wrong)
            raise error(f"{name} cannot be read as a tokenizer.json: {problem}. {advice}".rstrip()) from None
        self._library.no_truncation()
        self._library.no_padding()
        for randomness in ("dropout", "alpha", "nbest_size"):
            if hasattr(self._library.model, randomness):
                setattr(self._library.model, randomness, None)
        if self._library.decoder is None:
            self._library.decoder = self._missing_decoder()

    @staticmethod
    def open(path: Path, error: type[MegatrainError] = DataError, advice: str = "") -> Tokenizer:
        """Read a tokenizer.json, or that of a folder. Raises ``error``, with advice, where it is missing or broken."""
        if path.is_dir():
            path = path / TOKENIZER_FILE
        try:
            data = path.read_bytes()
        except OSError as problem:
            raise error(f"{path} cannot be read as a tokenizer.json: {problem.strerror}. {advice}".rstrip()) from None
        return Tokenizer(data, path, error, advice)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.json).hexdigest()

    @cached_property
    def ids(self) -> dict[str, int]:
        return dict(self._library.get_vocab(with_added_tokens=True))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: a vocabulary may have holes."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def control(self) -> dict[str, int]:
        """The tokens that stand for no text, and their ids.

        These are the special ones, the one for unknown text, and among the other added ones those in angle brackets:
        files differ in whether they call <tool_call> or <|fim_prefix|> special. Other added tokens are words. A
        vocabulary that spells characters has <s> or [CLS] only for control; one of bytes may have learned them.
        """
        added = self._library.get_added_tokens_decoder().items()
        found = {t.content: i for i, t in added if t.special or _CONTROL_LIKE.fullmatch(t.content)}
        if not self.is_byte_level:
            found |= {token: number for token, number in self.ids.items() if _CONTROL_NAMES.fullmatch(token)}
        return found if self.unknown is None else {self.unknown: self.ids[self.unknown], **found}

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The control tokens that no message may write: not those such as <think> and <tool_call>, which are added to
        a vocabulary for models to write, and which files do not call special.
        """
        added = self._library.get_added_tokens_decoder().values()
        written = {token.content for token in added if not token.special}
        return tuple(token for token in self.control if token not in written)

    @cached_property
    def added(self) -> dict[str, int]:
        """The tokens that were added to the model's own, and their ids: control tokens and others."""
        return {token.content: number for number, token in self._library.get_added_tokens_decoder().items()}

    def decoder_start(self, eod_id: int) -> int:
        """A decoder's first input beside an encoder: as in T5 and Marian the padding token, where there is one; else,
        as in BART, the token that ends documents."""
        return self.added.get(_PAD, eod_id)

    @cached_property
    def unknown(self) -> str | None:
        """The token for what the model has no other token for; None: it has none."""
        model = self.description["model"]
        if model["type"] == "Unigram":
            return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
        token: str | None = model["unk_token"]
        return token if token in self.ids else None

    def token_of(self, token_id: int) -> str | None:
        """The token of an id, None where the vocabulary has a hole."""
        token: str | None = self._library.id_to_token(token_id)
        return token

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is a single byte of a character that has no token of its own (byte_fallback)."""
        return self.token_of(token_id) in _BYTE_TOKENS

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, nothing added; control tokens that are spelled out in it count as such."""
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def begins_with(self, token_id: int) -> bool:
        """Whether the file asks for this token before every text (its post-processor), as transformers then puts it."""
        return bool(self._library.encode("a", add_special_tokens=True).ids[:1] == [token_id])

    def with_borders(self, begin: str | None, end: str) -> bytes:
        """A tokenizer.json that puts ``begin`` before a text (None: nothing) and ``end`` behind it, and behind the
        second of two, as those of BERT and T5 do; this one where it puts them already."""
        from tokenizers import processors

        ids = [(token, self.ids[token]) for token in (begin, end) if token is not None]
        before = [] if begin is None else [self.ids[begin]]
        if self._library.encode("a", add_special_tokens=True).ids == [*before, *self.encode("a"), self.ids[end]]:
            return self.json
        single = f"$A {end}" if begin is None else f"{begin} $A {end}"
        pair = f"{single} $B:1 {end}:1"
        template = processors.TemplateProcessing(single, pair, ids)
        description = orjson.loads(self.json)
        kept = [x for x in _parts(description.get("post_processor")) if x["type"] == "ByteLevel"]  # it adds no token
        found = [*kept, orjson.loads(template.__getstate__())]
        description["post_processor"] = {"type": "Sequence", "processors": found} if kept else found[0]
        return orjson.dumps(description)

    def comes_from_text(self, token: str) -> bool:
        """Whether text becomes this token when a dataset is made: found out by encoding it."""
        spelled = f"{token} {token} {self.decode([self.ids[token]])}"
        return token not in self.control and self.ids[token] in self.encode(spelled)

    def for_text(self, *control: str) -> bytes:
        """A tokenizer.json that gives text the same ids, but never that of a control token, nor of those named here.

        Such a token gets a name that no text has, in the list of added tokens and in the model, where Unigram,
        WordPiece and WordLevel would find it too; merges that would spell it out are left out.
        """
        description: dict[str, Any] = orjson.loads(self._library.to_str())
        description["post_processor"] = None  # it only adds tokens, and may name those that are hidden here
        secret = secrets.token_hex(16)
        hidden = {token: f"<{secret}-{self.ids[token]}>" for token in (*self.control, *control)}
        for token in description["added_tokens"]:
            if token["content"] in hidden:
                token.update(content=hidden[token["content"]], normalized=False)
        model = description["model"]
        if model["type"] == "Unigram":
            model["vocab"] = [(hidden.get(token, token), score) for token, score in model["vocab"]]
            if model["byte_fallback"]:  # text that spells a byte token out would become that byte
                split = {"type": "Split", "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"}, "behavior": "Isolated"}
                parts = [part for part in (description["pre_tokenizer"], {**split, "invert": False}) if part]
                description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
            return orjson.dumps(description)
        model["vocab"] = {hidden.get(token, token): number for token, number in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if model["type"] == "BPE":
            prefix = model["continuing_subword_prefix"] or ""
            model["merges"] = [
                (left, right)
                for left, right in model["merges"]
                if hidden.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
            ]
        return orjson.dumps(description)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def is_plain_bpe(self) -> bool:
        """Whether the model merges characters, each of which is a token or unknown wherever it stands."""
        model = self.description["model"]
        return model["type"] == "BPE" and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])

    @cached_property
    def loses_nothing(self) -> bool:
        """Whether all text has tokens: BPE that knows all bytes, and nothing in front of it that leaves text out."""
        from tokenizers.pre_tokenizers import ByteLevel

        keeps_text = all(
            part["type"] in _KEEPING_TEXT and part.get("content") != "" and part.get("behavior") != "Removed"
            for name in ("normalizer", "pre_tokenizer")
            for part in _parts(self.description[name])
        )
        spells_bytes = "ByteLevel" in self.component_types("normalizer", "pre_tokenizer")
        knows_bytes = (
            self.ids.keys() >= set(ByteLevel.alphabet())
            if spells_bytes
            else self.description["model"].get("byte_fallback", False) and self.ids.keys() >= _BYTE_TOKENS
        )
        return self.is_plain_bpe and keeps_text and knows_bytes

    def knows(self, character: str) -> bool:
        """Whether a character reaches the model and, in BPE, is or makes a token there.

        White space and control characters that do not reach the model were left out on purpose.
        """
        model = self.description["model"]
        reached = self._text_for_model(f"0{character}").removeprefix(self._text_for_model("0"))
        if not reached:
            return character.isspace() or not character.isprintable()
        if model["type"] != "BPE":
            return True
        prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
        return all(
            not self.ids.keys().isdisjoint((one, prefix + one, one + suffix))
            or (model["byte_fallback"] and self.ids.keys() >= {f"<0x{byte:02X}>" for byte in one.encode()})
            for one in reached
        )

    def unknown_spans(self, text: str) -> list[tuple[int, int]]:
        """Which characters of a text, [begin, end), are behind each unknown token."""
        encoding = self._library.encode(text, add_special_tokens=False)
        unknown_id = self.ids.get(self.unknown or "")
        return [span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if number == unknown_id]

    def _text_for_model(self, text: str) -> str:
        """A text after the normalizer and the pre-tokenizer, as the model gets it."""
        normalizer, splitter = self._library.normalizer, self._library.pre_tokenizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return text if splitter is None else "".join(word for word, _ in splitter.pre_tokenize_str(text))

    def token_lengths(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of text behind each id below ``vocab_size``; none behind control tokens and holes.

        A byte-level vocabulary spells every byte as one character. Any other is taken to spell text as it is, with
        SentencePiece's two signs: U+2581 for a space, and `<0xNN>` for a byte; and with those that a WordPiece has in
        front of what continues a word.
        """
        model = self.description["model"]
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = model.get("end_of_word_suffix") or ""
        lengths = np.zeros(vocab_size, np.int64)
        for token, token_id in self.ids.items():
            if token in self.control or token_id >= vocab_size:
                continue
            if token in self.added:
                lengths[token_id] = len(token.encode())
            elif self.is_byte_level:
                lengths[token_id] = len(token.removesuffix(suffix))
            else:
                lengths[token_id] = _spelled_bytes(token.removeprefix(prefix).removesuffix(suffix))
        return lengths

    @cached_property
    def description(self) -> dict[str, Any]:
        """The tokenizer as the library itself writes it: all keys are there, whoever wrote the file."""
        value: dict[str, Any] = orjson.loads(self._library.to_str())
        return value

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the vocabulary spells each byte as one character, as GPT-2's does."""
        return "ByteLevel" in self.component_types("normalizer", "pre_tokenizer", "decoder")

    def component_types(self, *names: str) -> set[str]:
        """The types of what is in these components ("normalizer", "pre_tokenizer", ...), however deep."""
        return {part["type"] for name in names for part in _parts(self.description[name])}

    def _missing_decoder(self) -> Any:
        """Files without a decoder are used by those who only encode; this is the one that fits how they encode."""
        from tokenizers import decoders

        model = self.description["model"]
        prefix = model.get("continuing_subword_prefix")
        if self.is_byte_level:
            return decoders.ByteLevel()
        if model["type"] == "WordPiece" or prefix:
            return decoders.WordPiece(prefix)
        if model.get("end_of_word_suffix"):
            return decoders.BPEDecoder(model["end_of_word_suffix"])
        if model["type"] == "WordLevel":
            return None  # words with spaces between
        is_begun = any(
            part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
            for name in ("normalizer", "pre_tokenizer")
            for part in _parts(self.description[name])
        )
        spaces = decoders.Metaspace(prepend_scheme="always" if is_begun else "never")
        bytes_first = [decoders.ByteFallback()] if model.get("byte_fallback") else []
        return decoders.Sequence([*bytes_first, spaces, decoders.Fuse()])


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer and all that it is made of: the objects that have a type."""
    if isinstance(component, dict):
        if isinstance(component.get("type"), str):
            yield component
        for value in component.values():
            yield from _parts(value)
    elif isinstance(component, list):
        for value in component:
            yield from _parts(value)


def _spelled_bytes(token: str) -> int:
    if token in _BYTE_TOKENS:
        return 1
    return len(token.replace("\u2581", " ").encode())

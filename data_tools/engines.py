"""Encoders: `tokenizers`, the reference, and `fastokens`, used where it has been proven to give the same ids."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatrain.errors import ConfigError

EDGE_CASES = (
    "",
    " ",
    "\0\x01\x7f\u0080",
    "a\r\nb\r\n\r\n\tc\n  \n",
    "<|endoftext|> <|endoftext|><|endof<|endoftext|>text|>",
    "e\u0301 \u00e9 \ufb01 \u212b \u1e9b\u0323 \u0f73\u0f75",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u202eabc\u202c \ufeff\u200b\u00a0\u3000\u2028\u2029x",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u4e2d\u6587\u5b57 \ud55c\uad6d\uc5b4",
    "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\uffff\U0010ffff\ue000\ufffd",
    "I'll we'VE don't 'S ''s 123456789 1\u00b2\u00bd\u2167\u0664 ____ ---- \t\t\t" + " " * 300,
    "zero" * 500,
)


Encode = Callable[[Sequence[str]], tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]]
"""Gives the ids of all texts end to end, nothing added, and where each text's begin (one entry more than texts)."""


class Engine:
    """A choice of encoder. It may be sent to other processes: each builds the encoder when it first uses it."""

    def __init__(self, name: str, tokenizer_json: bytes) -> None:
        self.name = name
        self._tokenizer_json = tokenizer_json

    def __reduce__(self) -> tuple[type[Engine], tuple[str, bytes]]:
        return Engine, (self.name, self._tokenizer_json)

    @cached_property
    def encode(self) -> Encode:
        build = _build_fastokens if self.name == "fastokens" else _build_tokenizers
        return build(self._tokenizer_json)


def _build_tokenizers(tokenizer_json: bytes) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_buffer(tokenizer_json)

    def encode(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 (plain Exception)
            raise cannot_encode(error) from None
        ids = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum([len(one) for one in ids], out=offsets[1:])
        return np.concatenate([np.empty(0, np.uint32), *ids]), offsets

    return encode


def cannot_encode(error: Exception) -> ConfigError:
    """For an error of `tokenizers`, where a model needs an unknown token and has none."""
    return ConfigError(f"The tokenizer cannot encode every text: {error}. Give it an unknown token.")


def _build_fastokens(tokenizer_json: bytes) -> Encode:
    # Imported by name at run time: it is an accelerator, and a machine may lack its wheel.
    tokenizer: Any = importlib.import_module("fastokens").Tokenizer.from_json_str(tokenizer_json.decode())

    def encode(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        ids, offsets = tokenizer.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=False)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<i8")

    return encode


def choose_engine(wanted: str, tokenizer_json: bytes, sample: Sequence[str]) -> tuple[Engine, str | None]:
    """The engine to use, and a warning where it is slower than it might be.

    `fastokens` is chosen only after it gave the ids of `tokenizers` on EDGE_CASES and on `sample`, which should be of
    the text that is going to be encoded. Raises ConfigError where `fastokens` was insisted on and does not pass.
    """
    reference = Engine("tokenizers", tokenizer_json)
    if wanted == "tokenizers":
        return reference, None
    fast = Engine("fastokens", tokenizer_json)
    problem = _difference(fast, reference, [*EDGE_CASES, *sample])
    if problem is None:
        return fast, None
    if wanted == "fastokens":
        raise ConfigError(f"fastokens cannot be used: {problem}. Use --engine tokenizers, or auto.")
    return reference, f"fastokens is not used: {problem}. Encoding with tokenizers, many times slower."


def _difference(fast: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """Why fastokens is not to be trusted with this tokenizer and these texts; None if it is."""
    try:
        ids, offsets = fast.encode(texts)
    except Exception as error:  # noqa: BLE001 (a native library: whatever it cannot do, the reference can)
        return f"it fails with this tokenizer ({error!r:.200})"
    expected_ids, expected_offsets = reference.encode(texts)
    if np.array_equal(ids, expected_ids) and np.array_equal(offsets, expected_offsets):
        return None
    lengths = min(len(ids), len(expected_ids))
    differs = np.flatnonzero(ids[:lengths] != expected_ids[:lengths])
    first = int(differs[0]) if len(differs) else lengths
    text = texts[min(int(np.searchsorted(expected_offsets, first, side="right")) - 1, len(texts) - 1)]
    return f"its ids are not those of tokenizers for the text {text[:60]!r}"

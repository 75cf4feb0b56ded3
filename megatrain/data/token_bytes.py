"""How many bytes of text each token of a tokenizer stands for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatrain.errors import DataError


def token_lengths(tokenizer_path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of text behind each token id of a tokenizer.json.

    A byte-level vocabulary spells every byte as one character. Any other is taken to spell text as it is, with
    SentencePiece's two signs: U+2581 for a space, and `<0xNN>` for a byte.
    """
    try:
        tokenizer = orjson.loads(tokenizer_path.read_bytes())
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram models list their pieces with scores.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((p[0], i) for i, p in enumerate(vocabulary))
        byte_level = '"ByteLevel"' in orjson.dumps([tokenizer["decoder"], tokenizer["pre_tokenizer"]]).decode()
        lengths = np.zeros(vocab_size, np.int64)
        for token, token_id in pairs:
            lengths[token_id] = len(token) if byte_level else _spelled_bytes(token)
        for added in tokenizer["added_tokens"]:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{tokenizer_path} is no readable tokenizer ({error!r}). Copy the dataset again.") from None
    return lengths


def _spelled_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("\u2581", " ").encode())

"""Tokens that a tokenizer has room for and no text becomes: the sentinels of transforms in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError

TOKENS = ("<|fim_prefix|>", "<mask>")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be <mask> that is the question " * 20)
    return str(path)


def test_they_stand_beside_the_end_of_document_token_and_are_special(text: str, tmp_path: Path) -> None:
    train_tokenizer([text], 300, tmp_path / "tokenizer.json", ReadOptions(), [*TOKENS, TOKENS[0]])
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == ["<|endoftext|>", *TOKENS]
    assert all(token["special"] for token in added)


@pytest.mark.parametrize(("vocab_size", "tokens", "words"), [(258, TOKENS, "need 259"), (300, [""], "needs a name")])
def test_what_leaves_them_no_room_or_name_is_refused(
    vocab_size: int, tokens: list[str], words: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train_tokenizer([text], vocab_size, tmp_path / "tokenizer.json", ReadOptions(), tokens)
    assert not (tmp_path / "tokenizer.json").exists()

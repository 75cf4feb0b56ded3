"""What is asked of a tokenizer to be trained: tokens that no text becomes, and how text is cut into words."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_tools.engines import choose_engine
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from data_tools.units import ReadOptions
from megatrain.errors import ConfigError

TOKENS = ("<|fim_prefix|>", "<mask>")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be <mask> that is the question " * 20)
    return str(path)


def test_requested_special_tokens_are_added_as_special(text: str, tmp_path: Path) -> None:
    train_tokenizer([text], 300, tmp_path / "tokenizer.json", ReadOptions(), [*TOKENS, TOKENS[0]])
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [token["content"] for token in added] == ["<|endoftext|>", *TOKENS]
    assert all(token["special"] for token in added)


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "words"),
    [
        (258, TOKENS, "need 259"),
        *((300, [word], "needs marks") for word in ("", " the", "the end", "\u2581the", "==")),
    ],
)
def test_special_tokens_without_room_or_name_are_refused(
    vocab_size: int, tokens: list[str], words: str, text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train_tokenizer([text], vocab_size, tmp_path / "tokenizer.json", ReadOptions(), tokens)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("words", "options", "pieces"),
    [
        ("gpt2", {}, ["I", "'ll", "_", "pay", " 12345", "\n ", " if"]),
        ("llama3", {}, ["I", "'ll", "_pay", " ", "123", "45", "\n", " ", " if"]),
        ("qwen2", {}, ["I", "'ll", "_pay", " ", *"12345", "\n", " ", " if"]),
        ("gpt2", {"split_digits": True}, ["I", "'ll", "_", "pay", " ", *"12345", "\n ", " if"]),
    ],
)
def test_words_are_cut_as_the_named_model_does(
    words: str, options: dict[str, bool], pieces: list[str], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer([text], 300, path, ReadOptions(), TOKENS, words=words, **options)
    library = Tokenizer.from_file(str(path))
    sample = "I'll_pay 12345\n  if"
    assert library.pre_tokenizer is not None
    spans = [span for _, span in library.pre_tokenizer.pre_tokenize_str(sample)]
    assert [sample[begin:end] for begin, end in spans] == pieces
    assert library.decode(library.encode(sample).ids) == sample
    engine, warning = choose_engine("auto", load_tokenizer(path).text_json, [sample])
    if "split_digits" in options and version("fastokens") in ("0.3.2", "0.3.3", "0.3.4"):  # they know no Digits
        assert (engine.name, "Digits" in str(warning)) == ("tokenizers", True)
    else:
        assert (engine.name, warning) == ("fastokens", None)

"""The one reader of tokenizers: what a file may ask for and must not get, and what is behind each id."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from tests.tokenizer_samples import gemma, llama2, llama3, t5


def read(library: Library, **changes: object) -> Tokenizer:
    return Tokenizer(orjson.dumps({**orjson.loads(library.to_str()), **changes}), "tokenizer.json")


def byte_level() -> Library:
    """All bytes, one merge, a decoder."""
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    library = Library(models.BPE({**vocabulary, "ab": 256}, [("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def test_truncation_and_padding_are_off() -> None:
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    assert len(read(library).encode("cdefg")) == 5


@pytest.mark.parametrize("model", [{"dropout": 0.5}, {"dropout": 1.0}])
def test_dropout_is_off(model: dict[str, float]) -> None:
    description = orjson.loads(byte_level().to_str())
    tokenizer = read(byte_level(), model={**description["model"], **model})
    assert {tuple(tokenizer.encode("ab")) for _ in range(20)} == {(256,)}


def test_byte_level_without_decoder_still_decodes() -> None:
    description = orjson.loads(byte_level().to_str())
    del description["decoder"]
    tokenizer = Tokenizer(orjson.dumps(description), "tokenizer.json")
    ids = tokenizer.encode("ab \u4e2d")
    assert tokenizer.decode(ids) == "ab \u4e2d"
    assert tokenizer.token_lengths(tokenizer.vocab_size)[ids].tolist() == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [llama2, gemma, t5, llama3], ids=lambda make: make.__name__)
def test_a_missing_decoder_is_made_up_for(make: Callable[[], Library]) -> None:
    library = make()
    whole, lacking = read(library), read(library, decoder=None)
    for text in ("to be or not", " to  the\u4e2d", "the"):
        ids = whole.encode(text)
        assert lacking.decode(ids) == whole.decode(ids)


def test_ends_of_words_are_no_text() -> None:
    vocabulary = {token: number for number, token in enumerate(("a", "b", "b</w>", "ab</w>"))}
    library = Library(models.BPE(vocabulary, [("a", "b</w>")], end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    assert read(library).decode(read(library).encode("ab b ab")) == "ab b ab"


def test_holes_count_in_the_size_of_a_vocabulary() -> None:
    tokenizer = read(Library(models.WordLevel({"a": 0, "b": 1000}, "a")))
    assert tokenizer.vocab_size == 1001
    assert tokenizer.token_of(5) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_named(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"x/tokenizer\.json cannot be read"):
        Tokenizer(data, "x/tokenizer.json", ConfigError)

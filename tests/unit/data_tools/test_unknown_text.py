"""Text that a tokenizer has no tokens for is counted and told, and refused where it is too much."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest
from data_samples import RunCommand, folder_bytes, json_lines
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from megatrain.data.format import Manifest, Unknown
from megatrain.errors import DataError
from tests.tokenizer_samples import ENDS, LETTERS, bert, gemma, llama2, llama3, numbered, qwen3, t5, word_level

ENGLISH, CHINESE = "to be or not to be", "\u4f60\u597d \u4e16\u754c to"
END = "<|endoftext|>"
Make = Callable[[], Library]


def without_unknown_token() -> Library:
    library = Library(models.BPE(numbered(["\u2581", *LETTERS]), []))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    return library


def without_some_bytes() -> Library:
    """Of the three bytes of each Chinese character, at least one has no token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kept = [*sorted(set(alphabet) - {chr(code) for code in range(0xA1, 0x144)}), "\u0120", "\u00e4", "\u00bd"]
    library = Library(models.BPE(numbered(kept), []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    return library


def that_deletes() -> Library:
    library = llama3()
    library.normalizer = normalizers.Replace(Regex(r"\p{Han}"), "")
    return library


def words_with_ends() -> Library:
    """GPT-1 and CLIP: a letter that ends a word is another token than one that does not."""
    vocabulary = numbered(["<unk>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)])
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


LOSING: list[tuple[Make, int]] = [
    (without_unknown_token, 0),
    (without_some_bytes, 0),
    (that_deletes, 0),
    (words_with_ends, 4),
    (lambda: llama2(fallback=False), 2),
    (t5, 2),
    (bert, 4),
    (word_level, 2),
]
"""And how many unknown tokens they make of four Chinese characters in two words."""


def prepared(library: Library, path: Path) -> Path:
    library.add_special_tokens([END])
    library.save(str(path))
    return path


def documents(num_english: int = 50) -> list[tuple[str, str]]:
    return [("first", ENGLISH), ("strange", f"be {CHINESE}"), *((str(k), ENGLISH) for k in range(num_english))]


@pytest.mark.parametrize(("make", "tokens"), LOSING)
def test_characters_without_tokens_are_counted_exactly(
    make: Make, tokens: int, tmp_path: Path, run_command: RunCommand
) -> None:
    tokenizer = prepared(make(), tmp_path / "tokenizer.json")
    (tmp_path / "a.jsonl").write_bytes(json_lines(documents()))
    command = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    code, out, err = run_command(*command, "--engine", "tokenizers", "--max-unknown", "0.01")
    total = sum(len(text) for _, text in documents())
    expected = Unknown(tokens, 4, total, f"{CHINESE!r} in strange")
    assert (code, str(expected) in err) == (0, True)
    assert Manifest.load(tmp_path / "out").unknown == expected
    code, out, _ = run_command("inspect", tmp_path / "out", "--json")
    assert (code, orjson.loads(out)["unknown"]["share"]) == (0, pytest.approx(4 / total))
    assert f"unknown              4 of {total} characters" in run_command("inspect", tmp_path / "out")[1]
    assert run_command("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("make", [llama2, llama3, qwen3, gemma])
def test_with_tokens_for_all_bytes_nothing_is_unknown(make: Make, tmp_path: Path, run_command: RunCommand) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_bytes(json_lines([("a", CHINESE * 10)]))
    arguments = ("--tokenizer", tmp_path, "--out", tmp_path / "out", "--max-unknown", 0, "--eod-token", ENDS[make])
    code, _, err = run_command("tokenize", tmp_path / "a.jsonl", *arguments)
    assert (code, "no tokens for" in err) == (0, False)
    assert Manifest.load(tmp_path / "out").unknown == Unknown()


@pytest.mark.parametrize(("num_english", "words"), [(0, "a sample of the text"), (20, "the text")])
def test_too_much_unknown_text_stops_and_keeps_parts(
    num_english: int, words: str, tmp_path: Path, run_command: RunCommand
) -> None:
    tokenizer = prepared(word_level(), tmp_path / "tokenizer.json")
    texts = [("a", CHINESE.removesuffix(" to")), *documents(num_english)[2:]]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    command = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    code, _, err = run_command(*command)
    assert (code, f"no tokens for too much of {words}:" in err, f"such as {texts[0][1]!r} in" in err) == (3, True, True)
    assert "--max-unknown" in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    parts = {path.name: path.stat().st_ino for path in (tmp_path / "out" / ".work").glob("parts-*/*.arrow")}
    assert bool(parts) == bool(num_english)
    assert run_command(*command, "--max-unknown", 1)[0] == 0
    unknown = Manifest.load(tmp_path / "out").unknown
    assert unknown is not None
    assert unknown.characters == 4
    assert run_command(*command)[0] == 3  # the limit holds for what was made under another, too


def test_counts_survive_an_interruption(tmp_path: Path) -> None:
    tokenizer = prepared(llama2(fallback=False), tmp_path / "tokenizer.json")
    effort = Effort(1, "auto", lambda *_: nullcontext(lambda _: None), lambda _: None, 300, worker_seconds=0.0)
    inputs = tmp_path / "in"
    inputs.mkdir()

    def run(out: str) -> Manifest:
        manifest = tokenize([str(inputs)], tokenizer, tmp_path / out, TokenizeOptions(), effort)
        assert manifest is not None
        return manifest

    (inputs / "a.jsonl").write_bytes(json_lines(documents() * 2))
    (inputs / "b.jsonl").write_bytes(json_lines(documents()) + b"broken")
    with pytest.raises(DataError, match="bad JSON"):
        run("interrupted")
    assert len(list((tmp_path / "interrupted" / ".work").glob("parts-*/*.arrow"))) > 3
    (inputs / "b.jsonl").write_bytes(json_lines(documents()))
    assert run("interrupted").unknown == run("straight").unknown
    unknown = run("straight").unknown
    assert unknown is not None
    assert (unknown.characters, unknown.tokens) == (12, 6)
    assert folder_bytes(tmp_path / "interrupted") == folder_bytes(tmp_path / "straight")


def test_a_model_failing_on_unknown_text_is_refused(tmp_path: Path, run_command: RunCommand) -> None:
    library = Library(models.Unigram([("a", -1.0), ("b", -1.0)], None))
    tokenizer = prepared(library, tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("ab\u4e2d")
    for engine in ("auto", "tokenizers"):
        command = ("tokenize", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", tmp_path / "out")
        code, _, err = run_command(*command, "--engine", engine)
        assert (code, "cannot encode every text" in err, "Traceback" in err) == (2, True, False)


def test_the_unknown_token_ends_no_documents(tmp_path: Path, run_command: RunCommand) -> None:
    tokenizer = prepared(word_level(), tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(ENGLISH)
    arguments = ("--tokenizer", tokenizer, "--out", tmp_path / "out", "--eod-token", "<unk>")
    code, _, err = run_command("tokenize", tmp_path / "a.txt", *arguments)
    assert (code, "is a token that text becomes" in err) == (2, True)

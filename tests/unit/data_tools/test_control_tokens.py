"""Text never becomes a control token, whatever the kind of the tokenizer and whatever the file calls special."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from data_samples import RunCommand, json_lines
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from data_tools.engines import Engine
from data_tools.tokenizer import load_tokenizer
from megatrain.data import open_dataset
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from tests.tokenizer_samples import (
    BYTES,
    ENDS,
    LETTERS,
    bert,
    gemma,
    llama2,
    llama3,
    qwen3,
    t5,
    without_spaces,
    word_level,
)

Make = Callable[[], Library]
SHAPES = pytest.mark.parametrize("make", list(ENDS), ids=lambda make: make.__name__)


@SHAPES
def test_literals_of_control_tokens_are_encoded_as_text(make: Make, tmp_path: Path) -> None:
    library = make()
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", ENDS[make])
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.json")
    control = {i for t, i in tokenizer.control.items() if t != tokenizer.unknown}
    assert len(control) >= 2
    spelled = list(tokenizer.control)
    texts = [*spelled, "".join(spelled), *(f"the {token}the" for token in spelled), " ".join(spelled)]
    for text in texts:
        ids = Engine("tokenizers", loaded.text_json).encode([text])[0]
        assert control.isdisjoint(ids.tolist()), text
        if make not in (word_level, bert):  # which have no other word for it than the unknown one
            assert without_spaces(tokenizer.decode(ids.tolist())) == without_spaces(text)


@SHAPES
def test_other_text_gets_the_ids_it_had(make: Make, tmp_path: Path) -> None:
    library = make()
    library.save(str(tmp_path / "tokenizer.json"))
    texts = ["to be or not to be\n\nthat is the question", "the  the", "\u4e2d\u6587 the", "a\n\n\nb <b> </i>"]
    ids, offsets = Engine("tokenizers", load_tokenizer(tmp_path / "tokenizer.json", ENDS[make]).text_json).encode(texts)
    for number, text in enumerate(texts):
        expected = library.encode(text, add_special_tokens=False).ids
        assert ids[offsets[number] : offsets[number + 1]].tolist() == expected


def test_undeclared_control_tokens_are_found_by_name() -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "[MASK]": 4, "to": 5, "<br>": 6}
    library = Library(models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(library.to_str().encode(), "tokenizer.json")
    ids = Engine("tokenizers", tokenizer.for_text()).encode(["to <s> </s> <pad> [MASK] <br>"])[0].tolist()
    assert ids == [5, 0, 0, 0, 0, 6]


def test_byte_tokens_spelled_out_stay_text() -> None:
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in BYTES), *((letter, -5.0) for letter in [*LETTERS, "\u2581"])]
    library = Library(models.Unigram(pieces, 0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(library.to_str().encode(), "tokenizer.json")
    ids = Engine("tokenizers", tokenizer.for_text()).encode(["a<0x41>\u4e2d<0x0Ab>"])[0].tolist()
    assert tokenizer.decode(ids) == "a<0x41>\u4e2d<0x0Ab>"


@pytest.mark.parametrize(
    ("make", "token", "is_word"),
    [(qwen3, "<|fim_prefix|>", False), (qwen3, "<tool_call>", False), (gemma, "<mask>", False), (gemma, "\n\n", True)],
)
def test_added_tokens_are_sentinels_unless_text_encodes_them(make: Make, token: str, is_word: bool) -> None:
    tokenizer = Tokenizer(make().to_str().encode(), "tokenizer.json")
    assert not make().get_added_tokens_decoder()[tokenizer.ids[token]].special
    assert tokenizer.comes_from_text(token) == is_word


@pytest.mark.parametrize(("make", "bos"), [(llama2, "<s>"), (llama3, "<|begin_of_text|>"), (t5, "<pad>")])
def test_each_document_begins_with_the_bos_token(make: Make, bos: str, tmp_path: Path, run_command: RunCommand) -> None:
    library, eod = make(), ENDS[make]
    library.save(str(tmp_path / "tokenizer.json"))
    texts = [f"to be {bos} or {eod}", "", "not the", bos]
    (tmp_path / "a.jsonl").write_bytes(json_lines([(str(k), text) for k, text in enumerate(texts)]))
    arguments = ("tokenize", tmp_path / "a.jsonl", "--tokenizer", tmp_path, "--eod-token", eod)
    assert run_command(*arguments, "--out", tmp_path / "plain")[0] == 0
    assert run_command(*arguments, "--bos-token", bos, "--out", tmp_path / "out")[0] == 0
    plain, dataset = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "out")
    assert (dataset.bos_id, dataset.manifest.bos_token) == (library.token_to_id(bos), bos)
    assert plain.bos_id is None
    assert dataset.digest != plain.digest
    for k in range(plain.num_documents):
        assert dataset.document(k).tolist() == [dataset.bos_id, *plain.document(k).tolist()]
    assert dataset.window_bytes(1, dataset.num_tokens - 1) == plain.text_bytes
    assert run_command("verify", tmp_path / "out")[0] == 0
    code, out, _ = run_command("inspect", tmp_path / "out", "--document", 1, "--json")
    shown = orjson.loads(out)
    assert (code, shown["bos_token"], without_spaces(shown["document"]["text"])) == (0, bos, "notthe")


@pytest.mark.parametrize(
    ("option", "token", "words"),
    [
        ("--bos-token", "the", "a token that text becomes"),
        ("--bos-token", "<none>", "has no token"),
        ("--bos-token", "</s>", "both"),
        ("--eod-token", "to", "a token that text becomes"),
    ],
)
def test_tokens_around_documents_must_be_control_tokens(
    option: str, token: str, words: str, tmp_path: Path, run_command: RunCommand
) -> None:
    word_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be or not to be")
    arguments = ["--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "out", "--eod-token", "</s>"]
    code, _, err = run_command("tokenize", tmp_path / "a.txt", *arguments, option, token)
    assert (code, words in err, option in err) == (2, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("meta-llama/Llama-3.1-8B", r"Tokenizer\.from_pretrained\('meta-llama/Llama-3\.1-8B'\)\.save"),
        ("folder", r"folder/tokenizer\.json .*AutoTokenizer"),
        ("none.json", "train-tokenizer"),
    ],
)
def test_how_to_get_a_tokenizer_json_is_said(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(Path(name))

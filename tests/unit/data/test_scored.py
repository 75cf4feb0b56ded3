"""Which tokens of a dataset count as targets: by window, across record batches and shards, in folders and elsewhere."""

from __future__ import annotations

import hashlib
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import orjson
import pytest

from data_tools import assemble
from data_tools.supervised import PromptAndAnswer
from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.units import Fields, ReadOptions
from data_tools.verify import verify_dataset
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import BATCH_TOKENS, Manifest
from megatrain.data.remote import Cache
from tests.tokenizer_samples import llama3

READ = ReadOptions(text_key="ask", fields=Fields(("say",), is_chat=False, option="--prompt-key"))
PLAIN_TOKENIZER = {
    "version": "1.0",
    **dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"]),
    "added_tokens": [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for i, token in enumerate(["<unk>", "<eod>"])
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "WordLevel",
        "vocab": {word: i for i, word in enumerate(["<unk>", "<eod>", "to", "be", "or", "not"])},
        "unk_token": "<unk>",
    },
}
GOLDEN = {
    "manifest.json": "a23e6d0334cd0794268bdbc965722b105ffcdb40a5607aaa41235a03f37f4161",
    "shard-000000.arrow": "cac5145ed71d5ad865f249f20624c0f305a54f9c46c85aa63a5d3f043eb42674",
    "shards.arrow": "4852aaf6ca26a2a073dd45d887f091a68a9df33f0264ccdac41100f942eaf44a",
    "tokenizer.json": "b3aece925f0ea6d93d3314d53c39424dd155c68fe67d7b11af4eca54d389978f",
}


def make(folder: Path, rows: list[dict[str, str]], options: TokenizeOptions, tokenizer: str) -> Manifest:
    (folder / "in.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (folder / "tokenizer.json").write_text(tokenizer)
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    manifest = tokenize(["in.jsonl"], folder / "tokenizer.json", folder / "out", options, effort)
    assert manifest is not None
    return manifest


def make_pairs() -> list[dict[str, str]]:
    rng = random.Random(3)
    texts = ["to be", " or", "\n\nnot", "\u00fc", "the question the question", " "]
    return [{"ask": "".join(rng.choices(texts, k=rng.randint(1, 4))), "say": rng.choice(texts)} for _ in range(60)]


@pytest.fixture(params=[BATCH_TOKENS, 100], ids=["one batch", "many batches"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Prompts and answers in several shards, whose documents cross the borders of record batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assemble, "BATCH_TOKENS", request.param)
    options = TokenizeOptions(READ, "<|end_of_text|>", shard_tokens=300, supervision=PromptAndAnswer())
    make(tmp_path, make_pairs(), options, llama3().to_str())
    return open_dataset(tmp_path / "out")


def expected_mask(dataset: Dataset) -> np.ndarray:
    """The tokens whose text lies behind the prompt, and the end of each document: this tokenizer spells bytes."""
    masks = []
    for k, pair in enumerate(make_pairs()):
        ends = np.cumsum(dataset.token_bytes[dataset.document(k)])
        masks.append(ends > len(pair["ask"].encode()))
    return np.concatenate(masks)


def test_scored_windows_add_up_across_shards(dataset: Dataset, tmp_path: Path) -> None:
    expected = expected_mask(dataset)
    assert dataset.num_shards > 3
    assert dataset.manifest.num_scored == expected.sum()
    remote = open_dataset(f"file://{tmp_path / 'out'}", Cache(tmp_path / "cache"))
    rng = random.Random(1)
    for opened in (dataset, remote):
        assert opened.has_scored
        for length in [0, 1, 2, 30, 600, dataset.num_tokens] * 10:
            start = rng.randrange(dataset.num_tokens - length + 1)
            scored = opened.scored(start, length)
            assert scored.dtype == np.bool_
            assert np.array_equal(scored, expected[start : start + length])
            assert opened.num_scored(start, length) == expected[start : start + length].sum()
    verify_dataset(str(tmp_path / "out"), lambda *_: nullcontext(lambda _: None))


def test_answers_begin_where_trl_has_them(dataset: Dataset) -> None:
    """At the first token that the prompt alone does not have: trl.data_utils.common_prefix_length."""
    for k, pair in enumerate(make_pairs()):
        alone, tokens = dataset.tokenizer.encode(pair["ask"]), dataset.document(k).tolist()
        begin, end = dataset.document_range(k)
        first = next(n for n, token in enumerate(tokens) if alone[n : n + 1] != [token])
        assert dataset.scored(begin, end - begin).tolist() == [number >= first for number in range(len(tokens))]


def test_the_digest_covers_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = TokenizeOptions(READ, "<|end_of_text|>", supervision=PromptAndAnswer())
    digests, across = set(), []
    pairs = [{"ask": "so", "say": " the"}, {"ask": "s", "say": "o the"}, {"ask": "so ", "say": "the"}]
    for number, pair in enumerate(pairs):
        (folder := tmp_path / str(number)).mkdir()
        monkeypatch.chdir(folder)
        manifest = make(folder, [pair], options, llama3().to_str())
        digests.add(manifest.digest)
        across.append((manifest.examples or {}).get("tokens_across_borders", 0))
    opened = [open_dataset(tmp_path / number / "out") for number in "012"]
    assert all(np.array_equal(opened[0].document(0), other.document(0)) for other in opened)
    assert [dataset.num_scored(0, dataset.num_tokens) for dataset in opened] == [2, 3, 2]
    assert across == [0, 0, 1]  # the token of a space and "the"
    assert len(digests) == 2


def test_plain_datasets_stay_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are those of the version before there were scored tokens."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "to be", "id": "a"}, {"text": "or not"}, {"text": ""}, {"text": "to be or not"}]
    options = TokenizeOptions(eod_token="<eod>", shard_tokens=8)
    make(tmp_path, rows, options, orjson.dumps(PLAIN_TOKENIZER).decode())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("*.*")}
    assert found == GOLDEN
    plain = open_dataset(tmp_path / "out")
    assert not plain.has_scored
    assert plain.scored(1, 5).all()
    assert plain.num_scored(1, 5) == 5

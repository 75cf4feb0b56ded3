"""inspect and stats: what they count is what is in the dataset."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import orjson
import pytest
from data_samples import WRITERS, Document, RunCommand
from PIL import Image

from data_tools import inspect
from megatrain.data import Dataset, open_dataset


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory, documents: list[Document], tokenizer_path: Path) -> Path:
    from data_tools.tokenize import Effort, TokenizeOptions, tokenize

    folder = tmp_path_factory.mktemp("looked-at")
    (folder / "in").mkdir()
    WRITERS["a.jsonl"](folder / "in" / "a.jsonl", documents)
    WRITERS["a.jsonl.gz"](folder / "in" / "b.jsonl.gz", documents[:50])
    effort = Effort(1, "tokenizers", lambda *_: nullcontext(lambda _: None), lambda _: None)
    tokenize([str(folder / "in")], tokenizer_path, folder / "out", TokenizeOptions(shard_tokens=4_000), effort)
    return folder / "out"


def all_documents(dataset: Dataset) -> list[np.ndarray]:
    return [dataset.document(k) for k in range(dataset.num_documents)]


def test_counts_are_those_of_the_documents(dataset_path: Path, run_command: RunCommand) -> None:
    dataset = open_dataset(dataset_path)
    documents = all_documents(dataset)
    code, out, err = run_command("inspect", dataset_path, "--all", "--json")
    assert (code, err) == (0, "")
    shown = orjson.loads(out)
    lengths = sorted(map(len, documents))
    figures = shown["tokens_per_document"]
    assert (figures["min"], figures["max"]) == (lengths[0], lengths[-1])
    assert figures["median"] == lengths[-(-len(lengths) // 2) - 1]
    assert figures["mean"] == pytest.approx(np.mean(lengths))
    for entry in shown["length_histogram"]:
        inside = [length for length in lengths if entry["from"] <= length < entry["to"]]
        assert (entry["documents"], entry["tokens"]) == (len(inside), sum(inside))
    assert sum(entry["documents"] for entry in shown["length_histogram"]) == len(documents)
    tokens = Counter(np.concatenate(documents).tolist())
    frequent = shown["frequent_tokens"]
    assert [entry["count"] for entry in frequent] == [number for _, number in tokens.most_common(len(frequent))]
    assert all(tokens[entry["id"]] == entry["count"] for entry in frequent)
    assert {entry["text"] for entry in frequent} >= {" ", "\n"}
    sources = {entry["source"]: entry for entry in shown["sources"]}
    by_file = Counter(dataset.document_info(k).source_file for k in range(dataset.num_documents))
    assert {name: entry["documents"] for name, entry in sources.items()} == by_file
    assert sum(entry["share"] for entry in sources.values()) == pytest.approx(1)
    assert sum(entry["text_bytes"] for entry in sources.values()) == dataset.text_bytes


def test_a_sample_says_that_it_is_one(
    dataset_path: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "SAMPLED_BATCHES", 3)
    counted = orjson.loads(run_command("stats", dataset_path, "--json")[1])["counted"]
    assert counted["record_batches"] == 3 < counted["of_record_batches"]
    assert counted["tokens"] < open_dataset(dataset_path).num_tokens
    assert f"a sample: 3 of {counted['of_record_batches']} record batches" in run_command("stats", dataset_path)[1]
    assert "all record batches" in run_command("stats", dataset_path, "--all")[1]


def test_a_million_small_files_are_counted_by_folder(dataset_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "MAX_SOURCES", 1)
    dataset = open_dataset(dataset_path)
    counted = inspect.count(dataset, lambda *_: nullcontext(lambda _: None), everything=True)
    assert len(counted.sources) == 1
    [(name, totals)] = counted.sources.items()
    assert dataset.document_info(0).source_file.startswith(name)
    assert tuple(totals) == (dataset.num_documents, dataset.num_tokens, dataset.text_bytes)


def test_the_picture_shows_something(dataset_path: Path, tmp_path: Path, run_command: RunCommand) -> None:
    code, out, err = run_command("stats", dataset_path, "--plot", tmp_path / "stats.png")
    assert (code, err) == (0, "")
    assert "source" in out
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("RGB").resize((150, 45)).tobytes())) > 20
    for wrong in (tmp_path / "no" / "stats.png", tmp_path / "stats.text"):
        code, _, err = run_command("stats", dataset_path, "--plot", wrong)
        assert code == 2
        assert str(wrong) in err


def test_people_see_lengths_sources_and_tokens(dataset_path: Path, run_command: RunCommand) -> None:
    code, out, _ = run_command("inspect", dataset_path, "--document", 5)
    assert code == 0
    for words in ("bytes per token", "document tokens", "###", "b.jsonl.gz", "frequent token", "Document 5: doc-"):
        assert words in out

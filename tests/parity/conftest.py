"""Ranks that all parity tests share, and a dataset whose documents are shorter than a sample."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.supervised import SourceAndTarget
from data_tools.tokenize import TokenizeOptions, tokenize
from tests.parity.figures import Pool
from tests.runs import TinyData
from tests.supervised import make_answers
from tests.tiny_data import QUIET


@pytest.fixture(scope="session")
def pool(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("weights")
    ranks = Pool(tiny_data, folder, request.getfixturevalue)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def short_documents(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two or three documents begin in each sample."""
    folder = tmp_path_factory.mktemp("short")
    lines = [line.strip() for topic in sorted(pydoc_data.topics.topics.values()) for line in topic.splitlines()]
    text = "".join(json.dumps({"text": line}) + "\n" for line in lines[:2000] if line)
    source, dataset = folder / "short.jsonl", folder / "set"
    source.write_text(text, encoding="utf-8")
    tokenize([str(source)], tiny_data.tokenizer, dataset, TokenizeOptions(), QUIET)
    return dataset


@pytest.fixture(scope="session")
def answers(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and answers; of one to some sixty tokens of a sample the loss is to be."""
    pairs = [("What is it? " * 6, "\n"), *((f"Count to {k}: ", " ".join(map(str, range(k)))) for k in range(1, 60))]
    return make_answers(tmp_path_factory.mktemp("answers"), pairs * 4, tiny_data.tokenizer)


@pytest.fixture(scope="session")
def translations(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a source and a target of unequal lengths, 1 to some 40 tokens."""
    pairs = [(" ".join(map(str, range(k))), f"{k} " * (1 + k % 7)) for k in range(1, 30)]
    folder = tmp_path_factory.mktemp("translations")
    return make_answers(folder, pairs * 8, tiny_data.tokenizer, SourceAndTarget("<|endoftext|>"))

"""The first 20 losses of the recipe tiny_cpu are those that were stored, for each version of torch.

What changes the model, its first weights, the order of data or the optimizer changes them, in every layout alike, which
no comparison of layouts would see. A change that is meant stores them anew: MEGATRAIN_STORE_GOLDEN=1.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from tests.runs import Metrics
from tests.served import ServedRanks
from tests.tiny_data import QUIET

STORED = Path(__file__).parent / "losses.json"
TOLERANCE = 1e-4
"""Relative: room for CPUs and libraries that sum in other orders. What is wrong moves losses by far more."""
WORDS = "the a this each of in on to and with model layer token step loss rank weight batch is was has runs reads"


def text(seed: int, num_words: int) -> str:
    """The same on every machine and for every version of Python."""
    vocabulary, words, state = WORDS.split(), [], seed
    for _ in range(num_words):
        state = (1103515245 * state + 12345) % 2**31
        words.append(vocabulary[(state >> 16) % len(vocabulary)])
    return " ".join(words)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text(seed, 300)}) + "\n" for seed in range(300)))
    train_tokenizer([str(folder / "in.jsonl")], 512, folder / "tokenizer.json", ReadOptions())
    tokenize([str(folder / "in.jsonl")], folder / "tokenizer.json", folder / "set", TokenizeOptions(), QUIET)
    return folder / "set"


@pytest.mark.slow
def test_losses_are_those_that_were_stored(dataset: Path, one_rank: ServedRanks, tmp_path: Path) -> None:
    paths = [f"data.{name}.{k}.path={dataset}" for name in ("train", "validation") for k in range(2)]
    one_rank.finish(Path("tiny_cpu"), *paths, f"run.dir={tmp_path / 'run'}", "train.steps=20")
    losses = Metrics.read(tmp_path / "run").losses
    version = ".".join(torch.__version__.split(".")[:2])
    stored = json.loads(STORED.read_text())
    if os.environ.get("MEGATRAIN_STORE_GOLDEN") == "1":
        STORED.write_text(json.dumps({**stored, version: losses}, indent=1, sort_keys=True) + "\n")
    elif version not in stored:
        pytest.skip(f"no losses are stored for torch {version}")
    else:
        assert losses == pytest.approx(stored[version], rel=TOLERANCE)

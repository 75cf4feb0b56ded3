"""A small real dataset, made from what comes with Python by the real data tools."""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from tests.runs import TinyData

VOCAB_SIZE = 512


def make_tiny_data(folder: Path) -> TinyData:
    """Prose (this Python's help topics), code (two modules of its library) and held-out prose, with one tokenizer."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts = {
        "prose": topics[:40],
        "code": [inspect.getsource(textwrap), inspect.getsource(inspect)[:60_000]],
        "held-out": topics[40:45],
    }
    for name, documents in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    tokenizer = folder / "tokenizer.json"
    train_tokenizer([str(folder / "prose.jsonl"), str(folder / "code.jsonl")], VOCAB_SIZE, tokenizer, ReadOptions())
    for name in texts:
        tokenize([str(folder / f"{name}.jsonl")], tokenizer, folder / name, TokenizeOptions(), QUIET)
    return TinyData(folder / "prose", folder / "code", folder / "held-out", tokenizer)


@contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Tells nobody how far it is."""
    yield lambda amount: None


QUIET = Effort(1, "tokenizers", silent, lambda warning: None)
"""One process that says nothing."""

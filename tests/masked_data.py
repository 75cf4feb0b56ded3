"""A dataset for masked language modeling, made by the real data tools."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from tests.runs import TinyData
from tests.tiny_data import QUIET, VOCAB_SIZE


def make_masked_data(folder: Path) -> TinyData:
    """Short and long documents in several shards, which begin with [CLS] and end with [SEP]; the tokenizer has [MASK]
    and [PAD] too."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    lines = [line for topic in topics for line in topic.splitlines() if line.strip()]
    texts = {"prose": [*lines[:300], *topics[:10]], "code": lines[300:800], "held-out": topics[10:14]}
    for name, documents in texts.items():
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer, options = folder / "tokenizer.json", TokenizeOptions(ReadOptions(), "[SEP]", "[CLS]", shard_tokens=4000)
    special = ["[CLS]", "[SEP]", "[MASK]", "[PAD]"]
    train_tokenizer([str(folder / "prose.jsonl")], VOCAB_SIZE, tokenizer, ReadOptions(), special)
    for name in texts:
        tokenize([str(folder / f"{name}.jsonl")], tokenizer, folder / name, options, QUIET)
    return TinyData(folder / "prose", folder / "code", folder / "held-out", tokenizer)

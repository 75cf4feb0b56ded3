"""Pairs of texts with labels, for classification, made by the real data tools."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import orjson

from data_tools.labeled import LabeledText
from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import Fields, ReadOptions
from tests.runs import TinyData
from tests.tiny_data import QUIET, VOCAB_SIZE

NUM_LABELS = 5
CLASSIFIER: dict[str, Any] = {"family": "bert", "num_key_value_heads": None, "num_labels": NUM_LABELS}
SPECIAL = ["[CLS]", "[SEP]", "[MASK]", "[PAD]"]


def make_labeled(rows: list[dict[str, Any]], tokenizer: Path, out: Path, supervision: LabeledText) -> Path:
    """A dataset of records with a `text`, a `label` and, where they are pairs, an `other`."""
    source = out.with_suffix(".jsonl")
    source.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    keys = ("label", "other") if supervision.has_pairs else ("label",)
    read = ReadOptions(fields=Fields(keys, is_chat=False, option="--text-key"))
    options = TokenizeOptions(read, "[SEP]", "[CLS]", shard_tokens=4000, supervision=supervision)
    tokenize([str(source)], tokenizer, out, options, QUIET)
    return out


def make_labeled_data(folder: Path) -> TinyData:
    """A line of a help topic and the one behind it, labeled by the topic; some are longer than samples."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    rows = []
    for number, topic in enumerate(topics):
        lines = [line.strip() for line in topic.splitlines() if line.strip()][:12]
        pairs = zip(lines, [*lines[1:], topic[:300]], strict=True)
        rows += [{"text": text, "other": other, "label": number % NUM_LABELS} for text, other in pairs]
    text = folder / "text.jsonl"
    text.write_bytes(b"".join(orjson.dumps({"text": row["text"]}) + b"\n" for row in rows[:400]))
    tokenizer = folder / "tokenizer.json"
    train_tokenizer([str(text)], VOCAB_SIZE, tokenizer, ReadOptions(), SPECIAL)
    parts = {"prose": rows[:300], "code": rows[300:500], "held-out": rows[500:560]}
    found = [make_labeled(some, tokenizer, folder / name, LabeledText("[SEP]", True)) for name, some in parts.items()]
    return TinyData(*found, tokenizer)

"""Datasets of prompts and answers, made by the real data tools."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import orjson

from data_tools.supervised import PromptAndAnswer, SourceAndTarget
from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import Fields, ReadOptions
from tests.tiny_data import QUIET

READ = ReadOptions(text_key="prompt", fields=Fields(("completion",), is_chat=False, option="--prompt-key"))


def make_answers(
    folder: Path,
    pairs: Iterable[tuple[str, str]],
    tokenizer: Path | None = None,
    supervision: PromptAndAnswer | SourceAndTarget | None = None,
) -> Path:
    """A dataset of prompts and their answers in several shards; without ``tokenizer``, a token is a byte."""
    rows = [orjson.dumps({"prompt": prompt, "completion": answer}) + b"\n" for prompt, answer in pairs]
    (folder / "pairs.jsonl").write_bytes(b"".join(rows))
    if tokenizer is None:
        tokenizer = folder / "tokenizer.json"
        train_tokenizer([str(folder / "pairs.jsonl")], 257, tokenizer, READ)
    options = TokenizeOptions(READ, shard_tokens=4000, supervision=supervision or PromptAndAnswer())
    tokenize([str(folder / "pairs.jsonl")], tokenizer, folder / "pairs", options, QUIET)
    return folder / "pairs"

"""What a dataset holds: counts, lengths of documents, and a document as text beside its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.data import Dataset, open_dataset
from megatrain.data.format import shard_name
from megatrain.errors import ConfigError

MAX_SAMPLED_SHARDS = 64
MAX_SHOWN_LINES = 40
MAX_SHOWN_TOKENS = 4000


def describe(path: str, document: int | None) -> dict[str, Any]:
    """The figures of a dataset, and document number `document` if one is asked for (ConfigError if there is none)."""
    dataset = open_dataset(path)
    manifest = dataset.manifest
    description: dict[str, Any] = {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "text_bytes": dataset.text_bytes,
        "empty_documents": manifest.num_empty_documents,
        "dtype": dataset.dtype.name,
        "digest": dataset.digest,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": dataset.vocab_size,
        "eod_id": dataset.eod_id,
        "eod_token": manifest.eod_token,
        "options": manifest.options,
        "bytes_per_token": dataset.text_bytes / dataset.num_tokens,
        "tokens_per_document": _length_figures(dataset),
        "shards": [{"file": shard_name(index), **row} for index, row in enumerate(dataset.shard_rows())],
    }
    if document is not None:
        description["document"] = _describe_document(dataset, document)
    return description


def describe_json(description: dict[str, Any]) -> bytes:
    """One JSON value and a newline."""
    return orjson.dumps(description, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def show(path: str, document: int | None) -> None:
    """Print the figures for people, and a document (the first, if none is asked for) as text beside its tokens."""
    description = describe(path, document or 0)
    shown = description.pop("document")
    shards = description.pop("shards")
    lengths = description.pop("tokens_per_document")
    console = Console(highlight=False, soft_wrap=True)
    for name, value in description.items():
        _show_figure(console, name, f"{value:.3f}" if isinstance(value, float) else str(value))
    _show_figure(console, "tokens_per_document", ", ".join(f"{name} {value:g}" for name, value in lengths.items()))
    _show_figure(console, "shards", f"{len(shards)}, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB")
    console.print()
    place = f"{shown['file']}, row {shown['row']}, {len(shown['tokens'])} tokens"
    console.print(Text(f"Document {shown['index']}: {shown['id']} ({place})"))
    _show_lines(console, open_dataset(path), shown["tokens"][:MAX_SHOWN_TOKENS])


def _show_figure(console: Console, name: str, value: str) -> None:
    console.print(Text(f"{name.replace('_', ' '):<20} {value}"))


def _length_figures(dataset: Dataset) -> dict[str, float]:
    """Tokens per document; the quantiles are those of up to MAX_SAMPLED_SHARDS shards, spread over all."""
    step = -(-dataset.num_shards // MAX_SAMPLED_SHARDS)
    sampled = [dataset.shard(index) for index in range(0, dataset.num_shards, step)]
    lengths = np.concatenate([np.diff(shard.views(k).offsets) for shard in sampled for k in range(len(shard.places))])
    quantiles = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    figures = {name: float(np.quantile(lengths, share)) for name, share in quantiles.items()}
    return {"mean": dataset.num_tokens / dataset.num_documents, **figures}


def _describe_document(dataset: Dataset, index: int) -> dict[str, Any]:
    try:
        tokens = dataset.document(index)
    except IndexError as error:
        raise ConfigError(str(error)) from None
    info = dataset.document_info(index)
    return {
        "index": index,
        "id": info.id,
        "file": info.source_file,
        "row": info.source_row,
        "hash": info.hash.hex(),
        "text_bytes": info.text_bytes,
        "text": _tokenizer(dataset).decode(tokens[:-1].tolist(), skip_special_tokens=False),
        "tokens": tokens.tolist(),
    }


def _show_lines(console: Console, dataset: Dataset, tokens: list[int]) -> None:
    """The text line by line, beside the tokens of each line."""
    tokenizer = _tokenizer(dataset)
    table = Table("text", "tokens", show_edge=False, show_lines=True)
    for number, (text, ids) in enumerate(_token_lines(tokenizer, tokens)):
        if number == MAX_SHOWN_LINES:
            table.add_row("...", "")
            break
        table.add_row(Text(_printable(text)), Text(" ".join(map(str, ids))))
    console.print(table)


def _token_lines(tokenizer: Any, tokens: list[int]) -> Iterator[tuple[str, list[int]]]:
    line: list[int] = []
    for token in tokens:
        line.append(token)
        if "\n" in tokenizer.decode([token]):
            yield tokenizer.decode(line, skip_special_tokens=False), line
            line = []
    if line:
        yield tokenizer.decode(line, skip_special_tokens=False), line


def _printable(text: str) -> str:
    """The text with control characters spelled out: a dataset is no place from which to command a terminal."""
    text = text.removesuffix("\n").replace("\t", "    ")
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _tokenizer(dataset: Dataset) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(dataset.tokenizer_path))

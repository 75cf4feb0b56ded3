"""What a dataset holds: counts, lengths of documents, and a document as text beside its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.data import Dataset
from megatrain.data.format import shard_name
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from megatrain.units import format_bytes

BAR_WIDTH = 30
MAX_SHOWN_ROWS = 10
MAX_SHOWN_LINES = 40
MAX_SHOWN_TOKENS = 4000


class OutputConsole(Console):
    """Standard output; leaves a reader that has gone to whoever runs the command."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this where it handles the error, and would exit with 1


def describe(dataset: Dataset, document: int | None) -> dict[str, Any]:
    """The figures of a dataset, and document number `document` if one is asked for (ConfigError if there is none)."""
    manifest = dataset.manifest
    description: dict[str, Any] = {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "text_bytes": dataset.text_bytes,
        "empty_documents": manifest.num_empty_documents,
        "unknown": manifest.unknown and {**asdict(manifest.unknown), "share": manifest.unknown.share},
        "dtype": dataset.dtype.name,
        "digest": dataset.digest,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": dataset.vocab_size,
        "eod_id": dataset.eod_id,
        "eod_token": manifest.eod_token,
        "bos_id": dataset.bos_id,
        "bos_token": manifest.bos_token,
        "options": manifest.options,
        "bytes_per_token": dataset.text_bytes / dataset.num_tokens,
        "shards": [{"file": shard_name(index), **row} for index, row in enumerate(dataset.shard_rows())],
    }
    if document is not None:
        description["document"] = _describe_document(dataset, document)
    return description


def describe_json(description: dict[str, Any]) -> bytes:
    return orjson.dumps(description, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def show(dataset: Dataset, document: int | None, counted: dict[str, Any]) -> None:
    """Print the figures for people, and a document (the first, if none is asked for) as text beside its tokens.

    ``counted``: what ``describe_statistics`` gives.
    """
    description = describe(dataset, document or 0)
    shown, shards = description.pop("document"), description.pop("shards")
    description["unknown"] = dataset.manifest.unknown
    console = OutputConsole(highlight=False, soft_wrap=True)
    for name, value in description.items():
        _show_figure(console, name, f"{value:.3f}" if isinstance(value, float) else str(value))
    _show_figure(console, "shards", f"{len(shards)}, {format_bytes(sum(shard['bytes'] for shard in shards))}")
    show_statistics(console, counted)
    console.print()
    place = f"{shown['file']}, row {shown['row']}, {len(shown['tokens'])} tokens"
    console.print(Text(_printable(f"Document {shown['index']}: {shown['id']} ({place})")))
    _show_lines(console, dataset, shown["tokens"][:MAX_SHOWN_TOKENS])


def show_statistics(console: Console, described: dict[str, Any]) -> None:
    counted, lengths = described["counted"], described["tokens_per_document"]
    whole = counted["record_batches"] == counted["of_record_batches"]
    extent = "all" if whole else f"a sample: {counted['record_batches']} of {counted['of_record_batches']}"
    _show_figure(console, "counted", f"{extent} record batches, {counted['tokens']} tokens")
    _show_figure(console, "tokens_per_document", ", ".join(f"{name} {value:.6g}" for name, value in lengths.items()))
    table = Table("document tokens", "documents", "", "tokens", show_edge=False, box=None)
    most = max(entry["documents"] for entry in described["length_histogram"])
    for entry in described["length_histogram"]:
        bar = "#" * -(-BAR_WIDTH * entry["documents"] // most)
        table.add_row(f"{entry['from']} to {entry['to'] - 1}", str(entry["documents"]), bar, str(entry["tokens"]))
    console.print(table)
    console.print("% of tokens  documents  bytes per token  source")
    for entry in described["sources"][:MAX_SHOWN_ROWS]:
        ratio = entry["text_bytes"] / entry["tokens"]
        figures = f"{100 * entry['share']:11.2f}  {entry['documents']:9}  {ratio:15.3f}"
        console.print(Text(f"{figures}  {_printable(entry['source'])}"))
    if len(described["sources"]) > MAX_SHOWN_ROWS:
        console.print(f"... and {len(described['sources']) - MAX_SHOWN_ROWS} more")
    table = Table("frequent token", "id", "% of tokens", show_edge=False, box=None)
    for entry in described["frequent_tokens"][:MAX_SHOWN_ROWS]:
        table.add_row(Text(_printable(repr(entry["text"]))), str(entry["id"]), f"{100 * entry['share']:.2f}")
    console.print(table)


def _show_figure(console: Console, name: str, value: str) -> None:
    console.print(Text(f"{name.replace('_', ' '):<20} {value}"))


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
        "text": dataset.tokenizer.decode(tokens[0 if dataset.bos_id is None else 1 : -1].tolist()),
        "tokens": tokens.tolist(),
    }


def _show_lines(console: Console, dataset: Dataset, tokens: list[int]) -> None:
    table = Table("text", "tokens", show_edge=False, show_lines=True)
    for number, (text, ids) in enumerate(_token_lines(dataset.tokenizer, tokens)):
        if number == MAX_SHOWN_LINES:
            table.add_row("...", "")
            break
        table.add_row(Text(_printable(text)), Text(" ".join(map(str, ids))))
    console.print(table)


def _token_lines(tokenizer: Tokenizer, tokens: list[int]) -> Iterator[tuple[str, list[int]]]:
    line: list[int] = []
    for token in tokens:
        line.append(token)
        if "\n" in tokenizer.decode([token]):
            yield tokenizer.decode(line), line
            line = []
    if line:
        yield tokenizer.decode(line), line


def _printable(text: str) -> str:
    """The text with control characters spelled out: a dataset is no place from which to command a terminal."""
    text = text.removesuffix("\n").replace("\t", "    ")
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)

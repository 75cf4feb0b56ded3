"""Real documents, and every kind of file that documents come in."""

from __future__ import annotations

import gzip
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_tools import cli
from data_tools.engines import EDGE_CASES
from megatrain.data.format import Manifest

Document = tuple[str, str]
MakeDataset = Callable[..., Manifest]
RunCommand = Callable[..., tuple[int, str, str]]


def make_documents() -> list[Document]:
    """Nasty Unicode, empty texts, line ends, NUL, literal special tokens; and this project's own sources."""
    sources = [inspect.getsource(module) for module in (cli, sys.modules[__name__], orjson, pytest, pa.types)]
    paragraphs = [text for source in sources for text in source.split("\n\n")]
    mixed = [text for pair in zip(paragraphs, EDGE_CASES * 50, strict=False) for text in pair]
    return [(f"doc-{number}", text) for number, text in enumerate(["", *mixed, "\r\n".join(sources) * 2, "", "last"])]


def json_lines(documents: list[Document]) -> bytes:
    return b"".join(orjson.dumps({"id": key, "text": text, "n": 1}) + b"\n" for key, text in documents)


def _write_arrow(path: Path, documents: list[Document], kind: str) -> None:
    table = pa.table({"text": [text for _, text in documents], "id": [key for key, _ in documents]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=100)
        return
    if kind == "dictionary":
        table = table.set_column(0, "text", table["text"].combine_chunks().dictionary_encode())
    opened = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=37)


def _write_text_files(path: Path, documents: list[Document]) -> None:
    path.mkdir()
    for number, (_, text) in enumerate(documents):
        (path / f"{number:05d}.txt").write_bytes(text.encode())


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


WRITERS: dict[str, Callable[[Path, list[Document]], None]] = {
    "a.jsonl": lambda path, documents: _write_bytes(path, json_lines(documents)),
    "a.jsonl.gz": lambda path, documents: _write_bytes(path, gzip.compress(json_lines(documents), mtime=0)),
    "a.json.gz": lambda path, documents: _write_bytes(path, gzip.compress(json_lines(documents), mtime=0)),
    "a.jsonl.zst": lambda path, documents: _write_bytes(path, zstandard.compress(json_lines(documents))),
    "a.parquet": lambda path, documents: _write_arrow(path, documents, "parquet"),
    "file.arrow": lambda path, documents: _write_arrow(path, documents, "file"),
    "dictionary.arrow": lambda path, documents: _write_arrow(path, documents, "dictionary"),
    "stream.arrow": lambda path, documents: _write_arrow(path, documents, "stream"),
    "texts": _write_text_files,
}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

"""A demo corpus of two kinds of real text that every Python installation brings along: code and prose.

Code is the standard library's own sources, without its tests. Prose is what they say about themselves: the
documentation strings of each module, and the topics of `help()`. Some documents of each, by their name, are held out.
"""

from __future__ import annotations

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import xxhash
import zstandard

from megatrain.atomic import committed
from megatrain.errors import DataError

HELD_OUT_ONE_IN = 20
SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests"}


def make_corpus(out: Path) -> list[tuple[str, int, int]]:
    """Write code, code-val, prose and prose-val as .jsonl.zst into `out`; the same Python gives the same bytes.

    Returns name, documents and UTF-8 bytes of text of each file.
    """
    sources = list(_sources(Path(sysconfig.get_path("stdlib"))))
    if not sources:
        raise DataError("This Python has no sources of its standard library on disk, which the corpus is made of.")
    prose = [*_documentation(sources), *sorted(pydoc_data.topics.topics.items())]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, documents in (("code", sources), ("prose", prose)):
        held_out = [xxhash.xxh3_64_intdigest(key.encode()) % HELD_OUT_ONE_IN == 0 for key, _ in documents]
        for suffix, wanted in (("", False), ("-val", True)):
            chosen = [document for document, held in zip(documents, held_out, strict=True) if held is wanted]
            written.append(_write(out / f"{name}{suffix}.jsonl.zst", chosen))
    return written


def _write(path: Path, documents: list[tuple[str, str]]) -> tuple[str, int, int]:
    compressor = zstandard.ZstdCompressor(level=9)
    num_bytes = 0
    with committed(path) as unfinished, unfinished.open("wb") as raw, compressor.stream_writer(raw) as stream:
        for key, text in documents:
            stream.write(orjson.dumps({"id": key, "text": text}, option=orjson.OPT_APPEND_NEWLINE))
            num_bytes += len(text.encode())
    return path.name, len(documents), num_bytes


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every source file below the folder that holds UTF-8 text, in order of their names."""
    paths = [path for path in folder.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(folder).parts)]
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def _documentation(sources: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """For each module that has any, its documentation strings, each under the name of what it documents."""
    for name, text in sources:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sections = list(_docstrings(ast.parse(text), module))
        if sections:
            yield module, "\n\n\n".join(f"{title}\n\n{docstring}" for title, docstring in sections) + "\n"


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, title: str
) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield title, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{title}.{child.name}")

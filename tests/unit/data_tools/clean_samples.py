"""Real text with planted duplicates, and the two cleaning commands as functions."""

from __future__ import annotations

import pydoc_data.topics
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import zstandard

from data_tools.clean.dedup import DedupOptions, dedup
from data_tools.clean.filter import choose_filters, filter_documents
from data_tools.job import Effort
from data_tools.units import ReadOptions

WHOLE = ReadOptions(whole_records=True)


@contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda amount: None


def run_dedup(
    source: Path | str,
    out: Path,
    method: str = "exact",
    workers: int = 1,
    part_bytes: int = 100_000,
    restart: bool = False,
    read: ReadOptions = WHOLE,
    **options: Any,
) -> dict[str, Any]:
    effort = Effort(workers, silent, part_bytes)
    report = dedup([str(source)], out, DedupOptions(read, method, **options), effort, restart)
    assert report is not None
    return report


def run_filter(
    source: Path, out: Path, filters: str, workers: int = 1, part_bytes: int = 100_000, read: ReadOptions = WHOLE
) -> dict[str, Any]:
    effort = Effort(workers, silent, part_bytes)
    report = filter_documents([str(source)], out, read, choose_filters(filters, None), effort, False)
    assert report is not None
    return report


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder of .jsonl.zst, in order."""
    data = [
        zstandard.ZstdDecompressor().decompressobj().decompress(p.read_bytes()) for p in sorted(folder.glob("*.zst"))
    ]
    return [orjson.loads(line) for line in b"".join(data).splitlines()]


def write_records(path: Path, texts: Sequence[str], **keys: object) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"id": f"d{i}", "text": t, **keys}) + b"\n" for i, t in enumerate(texts)))
    return path


def real_paragraphs(count: int, num_words: int) -> list[str]:
    """Documents of real prose: paragraphs of Python's reference in a random order, each used some few times."""
    paragraphs = [p for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n") if len(p.split()) > 20]
    paragraphs = sorted(set(paragraphs))
    drawn = random.Random(5)
    documents = []
    for _ in range(count):
        words: list[str] = []
        while len(words) < num_words:
            words += drawn.choice(paragraphs).split()
        documents.append(" ".join(words[:num_words]))
    return documents


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(first: str, second: str) -> float:
    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def near_duplicate(text: str, similarity: float, drawn: random.Random) -> str:
    """The text with as many single words replaced as bring its Jaccard index with the original next to `similarity`."""
    words = text.split()
    places = drawn.sample(range(len(words)), len(words))
    best, found = text, 1.0
    for number, place in enumerate(places):
        words[place] = f"other{number}"
        changed = " ".join(words)
        now = jaccard(text, changed)
        if abs(now - similarity) > abs(found - similarity):
            return best
        best, found = changed, now
    return best

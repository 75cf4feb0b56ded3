"""Do the quality filters decide as datatrove's do, and how fast are they?

    python benchmarks/filters.py --peers-python /tmp/peers/bin/python [--documents 5000] [--fixture FILE]

datatrove (0.10.1) is installed apart: `python -m venv /tmp/peers`, then in there
`pip install "datatrove[processing,io]" spacy`.
The documents are this machine's own: manual pages, documentation, HTML as text, sources, drawn at random, always alike.
`--fixture` stores some 300 of them with datatrove's decisions, for the tests.
"""

from __future__ import annotations

import argparse
import gzip
import html.parser
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import zstandard

from data_tools.clean.filters import C4Quality, Document, Filter, GopherQuality, GopherRepetition

OURS: dict[str, Filter] = {
    "gopher_quality": GopherQuality(),
    "gopher_repetition": GopherRepetition(),
    "c4_quality": C4Quality(),
}
KINDS = {"man": ".gz", "html": ".html", "prose": (".md", ".rst", ".txt"), "python": ".py"}
SHARES = {"man": 0.2, "html": 0.25, "prose": 0.35, "python": 0.2}
ROOTS = ("/usr", "/opt", "/root/.pyenv", sys.prefix)
MAX_CHARACTERS = 6_000
FIXTURE_DOCUMENTS, FIXTURE_CHARACTERS = 320, 4_000

PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import split_into_parts
peers = {"gopher_quality": GopherQualityFilter(), "gopher_repetition": GopherRepetitionFilter(),
         "c4_quality": C4QualityFilter()}
texts = [json.loads(line) for line in open(sys.argv[1])]
seconds, decisions = {}, {}
for name, peer in peers.items():
    split_into_parts.cache_clear()
    peer.filter(Document(text="warm up " * 100, id=""))
    begin = time.process_time()
    found = [peer.filter(Document(text=text, id="")) for text in texts]
    seconds[name] = time.process_time() - begin
    decisions[name] = [each if isinstance(each, bool) else each[1] for each in found]
json.dump({"seconds": seconds, "decisions": decisions}, open(sys.argv[2], "w"))
"""


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def read_document(path: Path, kind: str) -> str:
    """The text of a file."""
    data = path.read_bytes()
    if kind == "man":
        data = subprocess.run(
            ["sed", "-E", r"s/^\.(SH|SS|TH|B|I|BR|IR|RB|TP|IP|PP|RS|RE|nf|fi|br|sp|ft|Pp|Nm|Fl)\b *//; s/\\f.//g"],
            input=gzip.decompress(data),
            capture_output=True,
            check=True,
        ).stdout
    text = data.decode(errors="replace")
    if kind == "html":
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.pieces)
    return text[:MAX_CHARACTERS]


def find_documents(count: int) -> Iterator[str]:
    """Documents of each kind, without repeats."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            for kind, endings in KINDS.items():
                if kind != "man" or "/man/" in folder:
                    found[kind] += [Path(folder, name) for name in names if name.endswith(endings)]
    seen: set[str] = set()
    for kind, paths in found.items():
        random.Random(kind).shuffle(paths := sorted(set(paths)))
        taken = 0
        for path in paths:
            try:
                text = read_document(path, kind)
            except (OSError, EOFError, zlib.error, subprocess.CalledProcessError):
                continue
            if len(text) < 100 or text in seen:
                continue
            seen.add(text)
            yield text
            taken += 1
            if taken >= count * SHARES[kind]:
                break


def main() -> None:
    """Compare, print, and store the fixture if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", required=True)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--fixture", type=Path)
    parser.add_argument("--show", type=int, default=0, help="how many documents with other decisions to show")
    options = parser.parse_args()
    texts = list(find_documents(options.documents))
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "texts.jsonl"), Path(folder, "result.json")
        source.write_text("".join(json.dumps(text) + "\n" for text in texts))
        subprocess.run([options.peers_python, "-c", PEER, str(source), str(result)], check=True)
        peers = json.loads(result.read_text())
    for name, ours in OURS.items():
        begin = time.process_time()
        reasons = [ours.reason(Document(text)) for text in texts]
        seconds = time.process_time() - begin
        theirs = [each is True for each in peers["decisions"][name]]
        same = [(reason is None) == kept for reason, kept in zip(reasons, theirs, strict=True)]
        print(
            f"{name}: {sum(same) / len(same):.2%} the same decision ({len(same) - sum(same)} of {len(same)} differ); "
            f"datatrove keeps {sum(theirs) / len(theirs):.1%}; MB per CPU-second: {size / seconds:.2f}, "
            f"datatrove {size / peers['seconds'][name]:.2f}"
        )
        differing = [index for index, is_same in enumerate(same) if not is_same]
        for index in differing[: options.show]:
            print(f"    ours {reasons[index]}, datatrove {peers['decisions'][name][index]}: {texts[index][:200]!r}")
    if options.fixture:
        store_fixture(options.fixture, texts, peers["decisions"])


def store_fixture(path: Path, texts: list[str], decisions: dict[str, list[bool | str]]) -> None:
    """Some of the short documents, as many kept as dropped by each filter, with datatrove's decisions."""
    short = [index for index, text in enumerate(texts) if len(text) <= FIXTURE_CHARACTERS]
    short.sort(key=lambda index: zlib.crc32(texts[index].encode()))
    chosen: list[int] = []
    for name in OURS:
        for kept in (True, False):
            alike = [index for index in short if (decisions[name][index] is True) == kept and index not in set(chosen)]
            chosen += alike[: FIXTURE_DOCUMENTS // 6]
    rows = [{"text": texts[index], "kept": {name: decisions[name][index] is True for name in OURS}} for index in chosen]
    data = zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 19)
    path.write_bytes(data)
    print(f"{path}: {len(rows)} documents, {len(data)} bytes")


if __name__ == "__main__":
    main()

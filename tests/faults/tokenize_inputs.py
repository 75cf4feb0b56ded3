"""Input for tests of tokenizing: a folder with a plain file, compressed ones, a table and texts; and how to run it."""

from __future__ import annotations

import gzip
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_tools.engines import EDGE_CASES
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions

PART_BYTES = 60_000
SHARD_TOKENS = 50_000

SCRIPT = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data_tools.cli import main
from data_tools import job, tokenize

if __name__ == "__main__":
    # As the command does it, but in parts so small that there are many of them.
    tokenize.Effort.__init__.__defaults__ = (int(sys.argv.pop(1)), 0.01, 0.0)
    job.LOOK_AGAIN_SECONDS = 2.0
    main()
"""


def write_inputs(folder: Path, num_copies: int) -> None:
    """Some 140 KB of text a copy, in five kinds of file."""
    sources = [inspect.getsource(module) for module in (json.decoder, inspect, subprocess)]
    paragraphs = [text for source in sources for text in source.split("\n\n")]
    texts = [text for pair in zip(paragraphs, EDGE_CASES * 60, strict=False) for text in pair] * num_copies
    lines = [orjson.dumps({"id": f"doc-{number}", "text": text}) + b"\n" for number, text in enumerate(texts)]
    folder.mkdir()
    third = len(lines) // 3
    (folder / "a.jsonl").write_bytes(b"".join(lines[:third]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[third : 2 * third])))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[2 * third :]), mtime=0))
    pq.write_table(pa.table({"text": paragraphs}), folder / "d.parquet", row_group_size=200)
    for number, source in enumerate(sources):
        (folder / f"e{number}.txt").write_text(source)


def write_tokenizer(path: Path, folder: Path) -> None:
    """A small byte-level BPE of that text."""
    train_tokenizer([str(folder / "a.jsonl")], 500, path, ReadOptions())


def write_conversations(folder: Path, num_rows: int) -> None:
    """In two kinds of file."""
    roles = ("user", "assistant", "user", "assistant")
    talks = [
        {"messages": [{"role": role, "content": f"{role} {number} " * (number % 7)} for role in roles]}
        for number in range(num_rows)
    ]
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(orjson.dumps(talk) + b"\n" for talk in talks))
    pq.write_table(pa.Table.from_pylist(talks[::-1]), folder / "b.parquet", row_group_size=40)


def tokenize_command(folder: Path, *options: object, part_bytes: int = PART_BYTES) -> list[str]:
    """The command, to be run in `folder`, with inputs and tokenizer by names that are the same for all runs."""
    (folder / "run.py").write_text(SCRIPT)
    return [
        sys.executable, str(folder / "run.py"), str(part_bytes), "tokenize", "in", "--tokenizer", "tokenizer.json",
        "--shard-tokens", str(SHARD_TOKENS), *map(str, options),
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher of the tests themselves may have left there."""
    left_out = ("SLURM_", "OMPI_", "PMI", "RAYON_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return {**clean, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", **more}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

"""What benchmarks/tokenize.py does; its documentation is there."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
import xxhash
import zstandard
from rich.console import Console
from rich.table import Table

from data_tools.corpus import make_corpus
from megatrain.data import open_dataset

PEERS_SCRIPT = Path(__file__).parent / "_tokenize_peer.py"
MOST_SLOW_MEGABYTES = 60
VOCAB_SIZE = 32_768
TRAINING_MEGABYTES = 30
NUM_CORES = 2
SUFFIXES = {
    ".py",
    ".pyi",
    ".rst",
    ".md",
    ".html",
    ".txt",
    ".h",
    ".hpp",
    ".c",
    ".cpp",
    ".js",
    ".json",
    ".xml",
    ".pm",
    ".gz",
}
FOLDERS = [sysconfig.get_path("purelib"), "/usr/lib/python3", "/usr/include", "/usr/share", "/usr/lib/gcc"]
MOST_FILE_BYTES = 5_000_000

ALONE = {
    "tokenizers, encode_batch alone": "encode_batch",
    "tokenizers, encode_batch_fast alone": "encode_batch_fast",
    "fastokens alone": "fastokens",
}
WHOLE = {"datatrove, whole process": "datatrove", "datasets.map, whole process": "datasets"}


class Result(NamedTuple):
    """What a run cost, and what it gave."""

    num_bytes: int
    cpu_seconds: float
    wall_seconds: float
    digest: str
    """Of the ids of the first documents, where they are known."""

    @property
    def rate(self) -> float:
        """MB a CPU-second."""
        return self.num_bytes / 1e6 / self.cpu_seconds


def real_texts(scratch: Path) -> Iterator[str]:
    """Documents that this machine has, each once, in an order that mixes the kinds."""
    make_corpus(scratch / "corpus")
    corpus = [path.read_bytes() for path in sorted((scratch / "corpus").glob("*.zst"))]
    for data in corpus:
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(data).splitlines()
        yield from (orjson.loads(line)["text"] for line in lines)
    paths = [path for folder in FOLDERS for path in sorted(Path(folder).rglob("*")) if path.suffix in SUFFIXES]
    random.Random(0).shuffle(paths)
    seen = set()
    for path in paths:
        try:
            data = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
            text = data.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        digest = xxhash.xxh3_128_digest(data)
        if digest not in seen and text.strip() and len(data) <= MOST_FILE_BYTES:
            seen.add(digest)
            yield text


def write_text(path: Path, megabytes: int, scratch: Path) -> float:
    """Write that much text as JSON lines, repeated where there is too little; gives how many MB are distinct."""
    num_bytes = num_distinct = 0
    with path.open("wb") as file:
        while num_bytes < megabytes * 1e6:
            for text in real_texts(scratch):
                file.write(orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE))
                num_bytes += len(text.encode())
                if num_bytes >= megabytes * 1e6:
                    break
            num_distinct = num_distinct or num_bytes
    return num_distinct / 1e6


def timed(command: list[str], messages: int | None = None) -> tuple[float, float, str]:
    """CPU-seconds of a process and its children, wall seconds, and its standard output."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(NUM_CORES), "TOKENIZERS_PARALLELISM": "true"}
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, env=environment, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begun, output


def run_megatrain(text: Path, tokenizer: Path, out: Path, num_compared: int) -> Result:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "data_tools", "tokenize", str(text), "--tokenizer", str(tokenizer)]
    cpu_seconds, wall_seconds, _ = timed([*command, "--out", str(out), "--workers", str(NUM_CORES)])
    dataset = open_dataset(out)
    digest = xxhash.xxh3_64()
    for number in range(min(num_compared, dataset.num_documents)):
        digest.update(dataset.document(number)[:-1].astype("<u4"))
    num_bytes = json.loads((out / "manifest.json").read_bytes())["text_bytes"]
    return Result(num_bytes, cpu_seconds, wall_seconds, digest.hexdigest())


def run_alone(name: str, text: Path, tokenizer: Path, megabytes: int, num_compared: int) -> Result:
    command = [sys.executable, str(PEERS_SCRIPT), name, str(text), str(tokenizer), str(megabytes), str(num_compared)]
    *numbers, digest = timed(command)[2].split()
    return Result(int(numbers[0]), float(numbers[1]), float(numbers[2]), digest)


def run_peer(name: str, python: str, text: Path, tokenizer: Path, out: Path, num_bytes: int) -> Result | None:
    shutil.rmtree(out, ignore_errors=True)
    if subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode:
        print(f"{name} is left out: {python} has none", file=sys.stderr)
        return None
    command = [python, str(PEERS_SCRIPT), name, str(text), str(tokenizer), str(out)]
    cpu_seconds, wall_seconds, _ = timed(command, subprocess.DEVNULL)
    return Result(num_bytes, cpu_seconds, wall_seconds, "")


def show(title: str, results: dict[str, Result]) -> None:
    table = Table("what", "MB", "MB a CPU-second", "MB a second", "beside encode_batch", "ids", title=title)
    reference = results["tokenizers, encode_batch alone"]
    for name, result in results.items():
        same = "" if not result.digest else "the same" if result.digest == reference.digest else "DIFFERENT"
        table.add_row(
            name,
            f"{result.num_bytes / 1e6:.0f}",
            f"{result.rate:.2f}",
            f"{result.num_bytes / 1e6 / result.wall_seconds:.2f}",
            f"{result.rate / reference.rate:.1f}",
            same,
        )
    Console(width=120).print(table)


def main(documentation: str) -> None:
    """Parse the command line, make the text, run everybody, and show it."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[60, 500])
    parser.add_argument("--peers-python", help="a Python that has datatrove and datasets")
    parser.add_argument("--work", help="a folder for the text, which is kept; else a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = folder / "tokenizer.json"
        measured: dict[tuple[str, int], Result] = {}
        for megabytes in arguments.megabytes:
            text = folder / f"text-{megabytes}.jsonl"
            distinct = megabytes if text.exists() else write_text(text, megabytes, Path(scratch))
            if not tokenizer.exists():
                sample = Path(scratch) / "sample.jsonl"
                sample.write_bytes(text.read_bytes()[: TRAINING_MEGABYTES * 1_000_000].rpartition(b"\n")[0])
                train = [sys.executable, "-m", "data_tools", "train-tokenizer", str(sample), "--out", str(tokenizer)]
                timed([*train, "--vocab-size", str(VOCAB_SIZE)])
            slow_megabytes = min(megabytes, MOST_SLOW_MEGABYTES)
            num_compared = 1000
            results = {
                "megatrain-data tokenize, whole command": run_megatrain(
                    text, tokenizer, Path(scratch) / "out", num_compared
                )
            }
            for title, name in ALONE.items():
                size = megabytes if name == "fastokens" else slow_megabytes
                # Every text begins with the same documents.
                if (name, size) not in measured:
                    measured[name, size] = run_alone(name, text, tokenizer, size, num_compared)
                results[title] = measured[name, size]
            if arguments.peers_python and megabytes <= MOST_SLOW_MEGABYTES:
                num_bytes = results["megatrain-data tokenize, whole command"].num_bytes
                for title, name in WHOLE.items():
                    peer = run_peer(name, arguments.peers_python, text, tokenizer, Path(scratch) / name, num_bytes)
                    results |= {title: peer} if peer else {}
            show(f"{megabytes} MB of text, {distinct:.0f} MB of it distinct, {NUM_CORES} cores", results)

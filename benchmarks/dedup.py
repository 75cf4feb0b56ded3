"""How much text a CPU-second of `megatrain-data dedup` reads, of this code and of another checkout, in one run.

    python benchmarks/dedup.py [--megabytes 60] [--against FOLDER] [--rounds 3] [--work DIR]

Measured are whole commands: start-up, reading, comparing, writing and fsync included. The text is that of
benchmarks/tokenize.py, every fourth document a second time with one word in 50 replaced. "1 document" is the start.
The two take turns; the best of the rounds counts. The digests of what they write are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import orjson

from benchmarks._tokenize_run import NUM_CORES, real_texts, timed

HERE = Path(__file__).resolve().parents[1]
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import data_tools.cli as c; c.main()"


def write_text(path: Path, megabytes: float, scratch: Path) -> None:
    drawn = random.Random(0)
    num_bytes = 0
    with path.open("wb") as file:
        for number, text in enumerate(real_texts(scratch)):
            for again in range(1 + (number % 4 == 0)):
                words = text.split(" ")
                for place in drawn.sample(range(len(words)), again * len(words) // 50):
                    words[place] = "replaced"
                line = orjson.dumps({"text": " ".join(words)}, option=orjson.OPT_APPEND_NEWLINE)
                num_bytes += file.write(line)
            if num_bytes >= megabytes * 1e6:
                return


def run(checkout: Path, text: Path, out: Path, *options: str) -> tuple[float, str]:
    """CPU-seconds, and a digest of the folder."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", START, str(checkout), "dedup", str(text), "--out", str(out), *options]
    cpu_seconds, _, _ = timed([*command, "--workers", str(NUM_CORES)], os.open(os.devnull, os.O_WRONLY))
    digest = hashlib.sha256()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return cpu_seconds, digest.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="a folder for the text, which is kept; else a temporary one")
    arguments = parser.parse_args()
    checkouts = [HERE, *([arguments.against.resolve()] if arguments.against else [])]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        text, one = folder / f"text-{arguments.megabytes:g}.jsonl", folder / "one.jsonl"
        if not text.exists():
            write_text(text, arguments.megabytes, Path(scratch))
        one.write_bytes(orjson.dumps({"text": "the only one"}) + b"\n")
        for method in ("exact", "minhash"):
            for name, source in {f"{text.stat().st_size / 1e6:.0f} MB": text, "1 document": one}.items():
                results: dict[Path, list[tuple[float, str]]] = {checkout: [] for checkout in checkouts}
                for _ in range(arguments.rounds):
                    for checkout, found in results.items():
                        found.append(run(checkout, source, Path(scratch) / "out", "--method", method))
                for checkout, found in results.items():
                    seconds = min(found)[0]
                    rate = source.stat().st_size / 1e6 / seconds
                    print(f"{method:8} {name:12} {seconds:7.2f} CPU-s {rate:7.2f} MB/CPU-s  {found[0][1]}  {checkout}")


if __name__ == "__main__":
    main()

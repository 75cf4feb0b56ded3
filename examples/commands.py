"""What the examples have in common: they run commands of megatrain, shown, in a folder of their own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

ALIKE = ("--method", "minhash", "--ngram", "1", "--threshold", "0.7", "--num-permutations", "128")


def enter(folder: Path) -> None:
    """Go to a folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)


def run(*command: str) -> str:
    """Run a command of this installation; what it prints."""
    sys.stderr.write(f"$ {' '.join(command)}\n")
    name, *options = command
    ended = subprocess.run([str(Path(sys.executable).parent / name), *options], stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(ended.stdout + f"{name} ended with code {ended.returncode}")
    return ended.stdout


def shown(metric: Mapping[str, Any]) -> str:
    """A metric of a task, as in a table."""
    return f"{metric['value']:.3f} ± {metric['stderr']:.3f}"


def unpack(package: str) -> Path:
    """A package of Debian's, which is downloaded and unpacked into a folder of its name, not installed; the package."""
    if missing := [command for command in ("apt-get", "dpkg") if shutil.which(command) is None]:
        sys.exit(f"The data comes as Debian's package {package}, and there is no {missing[0]} here.")
    fetched = subprocess.run(["apt-get", "download", package], capture_output=True, text=True)
    if fetched.returncode:
        last = (fetched.stderr.strip().splitlines() or ["apt-get gives no reason"])[-1]
        sys.exit(f"Debian's package {package} cannot be had ({last}): `apt-get update` makes its name known.")
    (file,) = Path().glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", str(file), package], check=True)
    return file


def near_duplicates(name: str, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Of each of the named ``texts`` that `megatrain-data dedup` drops, its name and that of the one kept instead."""
    write_lines(Path(f"{name}.jsonl"), [{"id": each, "text": text} for each, text in texts])
    run("megatrain-data", "dedup", f"{name}.jsonl", "--id-key", "id", *ALIKE, "--out", name)
    for path in sorted(Path(name, ".report").glob("dropped-*.arrow")):
        dropped = pa.ipc.open_file(path).read_all()
        yield from zip(dropped["id"].to_pylist(), dropped["kept_id"].to_pylist(), strict=True)


def number_of(text: str) -> int:
    """The same for the same text, and as good as random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

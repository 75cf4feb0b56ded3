"""What several benchmarks need: the name of this machine's processor, a small dataset."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path


def cpu_name() -> str:
    """As Linux tells it."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def make_dataset(folder: Path, texts: list[str], vocab_size: int) -> Path:
    """Tokenize texts (files or patterns) into a dataset under ``folder``, with a vocabulary of their own."""
    tool, tokenizer, data = [sys.executable, "-m", "data_tools"], str(folder / "tokenizer.json"), folder / "data"
    for command in (
        [*tool, "train-tokenizer", *texts, "--vocab-size", str(vocab_size), "--out", tokenizer],
        [*tool, "tokenize", *texts, "--tokenizer", tokenizer, "--out", str(data)],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data

"""What a job over many parts asks of the file system and sends between processes: in proportion to its parts.

docs/data.md states the budgets.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from tests.traced import count_calls, needs_strace

pytestmark = [pytest.mark.slow, needs_strace]

PART_BYTES = 1000
NUM_PARTS = 1000
SCRIPT = f"""
from data_tools import units
units.PART_BYTES = {PART_BYTES}
from data_tools import tokenize
from data_tools.clean import attributes, candidates, dedup
attributes.TASK_BYTES = 20_000
candidates.WORKER_BYTES, candidates.JOINED_DOCUMENTS = 1, 400
dedup.MAX_RUN_DOCUMENTS, dedup.SLICE_DOCUMENTS = 100, 400
tokenize.BYTES_A_SECOND["tokenizers"] = 1  # so that there is work for all workers
from data_tools.cli import main
if __name__ == "__main__":
    main()
"""
CONSTANT = {"opens": 150, "looks": 250, "changes": 100, "listed": 1000, "messages": 100, "sent_bytes": 100_000}
"""What a process may do however small the job is."""
A_PART = {"opens": 10, "looks": 14, "changes": 3, "listed": 600, "messages": 4, "sent_bytes": 600}
"""What all processes together may do for each part."""
COMMANDS = {
    "tokenize": "--tokenizer {folder}/tokenizer.json --engine tokenizers --shard-tokens 20000",
    "dedup": "--method minhash --num-permutations 32",
    "filter": "--filters length",
    "split": "--validation 0.3 --method exact",
}


def run(command: str, num_parts: int, folder: Path) -> list[Counter[str]]:
    """What each process of the command does, of which two are workers."""
    folder.mkdir()
    lines = (json.dumps({"text": f"document {number}, " + "word " * 180}) + "\n" for number in range(num_parts))
    (folder / "in.jsonl").write_text("".join(lines))
    (folder / "script.py").write_text(SCRIPT)
    train_tokenizer([str(folder / "in.jsonl")], 300, folder / "tokenizer.json", ReadOptions())
    arguments = COMMANDS[command].format(folder=folder).split()
    arguments += ["--out", str(folder / "out"), "--workers", "2"]
    script = [sys.executable, str(folder / "script.py"), command, str(folder / "in.jsonl")]
    return count_calls([*script, *arguments], folder, folder / "trace")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.acceptance
def test_twice_the_parts_take_twice_the_calls(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    once, twice = (run(command, factor * NUM_PARTS, tmp_path / str(factor)) for factor in (1, 2))
    assert len(twice) <= len(once) + 2, "processes"
    for kind, constant in CONSTANT.items():
        one, two = (sum(process[kind] for process in counted) for counted in (once, twice))
        by_process = [process[kind] for process in once + twice]
        assert two <= 2.1 * one + constant, f"{kind}: {by_process}"
        assert two <= 2 * NUM_PARTS * A_PART[kind] + constant, f"{kind}: {by_process}"
    assert all(process["sent_bytes"] <= 1024 * process["messages"] for process in once + twice)

"""SIGKILL at any step of tokenizing, then the same command: the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.tokenize_inputs import (
    PART_BYTES,
    SHARD_TOKENS,
    environment,
    folder_bytes,
    tokenize_command,
    write_inputs,
    write_tokenizer,
)

KILLS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from tests.faults.forked_kills import print_exit_codes
import data_tools.assemble, tokenizers, fastokens, zstandard, pyarrow.parquet

_, out, part_bytes, shard_tokens, *steps = sys.argv

def work():
    effort = Effort(1, "auto", lambda *_: nullcontext(lambda n: None), print, int(part_bytes))
    tokenize(["in"], Path("tokenizer.json"), Path(out), TokenizeOptions(shard_tokens=int(shard_tokens)), effort)

print_exit_codes(work, out, steps)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    write_inputs(folder / "in", 2)
    write_tokenizer(folder / "tokenizer.json", folder / "in")
    subprocess.run(tokenize_command(folder, "--out", "alone"), cwd=folder, env=environment(), check=True)
    (folder / "kills.py").write_text(KILLS)
    return folder


@pytest.mark.parametrize(
    "num_kills",
    [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.acceptance])],
    ids=lambda number: f"{number} kills",
)
def test_kills_at_random_steps_change_no_byte(num_kills: int, folder: Path) -> None:
    out = f"killed-{num_kills}"
    generator = random.Random(num_kills)
    # Few steps at a time, or the first runs would finish the work before the last is killed.
    steps = [generator.randint(1, max(24, 300 // num_kills)) for _ in range(num_kills)]
    command = [sys.executable, "kills.py", out, str(PART_BYTES), str(SHARD_TOKENS), *map(str, steps), str(1 << 30)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * num_kills + [0]
    assert folder_bytes(folder / out) == folder_bytes(folder / "alone")


def test_kills_during_assembly_lose_no_shard_or_part(folder: Path) -> None:
    out = folder / "assembly"
    # Past the parts, then some steps further at a time: through the plan, each shard, the table, the manifest, the end.
    steps = [122, *range(24, 60, 2), 1 << 30]
    command = [sys.executable, "kills.py", out.name, str(PART_BYTES), str(SHARD_TOKENS), *map(str, steps)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes[:6] == [-signal.SIGKILL] * 6
    assert codes[-1] == 0
    assert folder_bytes(out) == folder_bytes(folder / "alone")


@pytest.mark.slow
def test_restart_removes_only_what_tokenize_made(folder: Path) -> None:
    out = folder / "again"
    command = tokenize_command(folder, "--out", "again")
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    os.utime(folder / "in" / "a.jsonl")
    changed = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert changed.returncode == 2
    subprocess.run([*command, "--restart"], cwd=folder, env=environment(), check=True)
    assert all(path.stat().st_mtime_ns > before[path.name] for path in out.glob("shard-*"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert folder_bytes(out) == folder_bytes(folder / "alone")
    other = [*command, "--errors", "replace", "--restart"]
    refused = subprocess.run(other, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "another one made" in refused.stderr
    assert folder_bytes(out) == folder_bytes(folder / "alone")

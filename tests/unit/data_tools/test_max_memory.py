"""`--max-memory`: what processes hold stays below it, and the result is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
from clean_samples import WHOLE, real_paragraphs, run_dedup, silent, write_records
from data_samples import RunCommand, folder_bytes

from data_tools import job
from data_tools.clean import clusters
from data_tools.clean.dedup import DedupOptions, dedup
from data_tools.executors import LocalPool, Place, Unfinished
from data_tools.job import Effort
from data_tools.memory import LEAST_BYTES, OWN_BYTES, Memory, bound_memory
from megatrain.errors import ConfigError

SCRIPT = """
import resource, sys
from data_tools.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print("PEAK", max(peaks) >> 10, file=sys.stderr)
"""


def peak_megabytes(folder: Path, *arguments: str) -> int:
    """The most that the command, or one of its workers, has held."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stderr.rpartition("PEAK ")[2])


@pytest.mark.slow
@pytest.mark.acceptance
def test_processes_stay_below_their_bound(tmp_path: Path) -> None:
    """Documents so short that 10 MB of text have 200 MB of attributes."""
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(200_000):
            words = " ".join(f"w{number % 50_000}-{place}" for place in range(3 + number % 3))
            file.write(json.dumps({"text": f"{words} of a text"}) + "\n")
    command = ("dedup", "in.jsonl", "--method", "minhash", "--num-permutations", "512", "--workers", "2")
    usual = peak_megabytes(tmp_path, *command, "--out", "usual")
    bounded = peak_megabytes(tmp_path, *command, "--out", "bounded", "--max-memory", f"{LEAST_BYTES >> 20}M")
    assert bounded <= LEAST_BYTES >> 20 < usual
    assert folder_bytes(tmp_path / "usual") == folder_bytes(tmp_path / "bounded")


def test_a_bad_bound_is_refused(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    command = ("dedup", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--workers", 1, "--max-memory")
    code, _, error = run_command(*command, "100M")
    assert (code, f"a process needs {LEAST_BYTES >> 20}M at least" in error) == (2, True)
    code, _, error = run_command(*command, "much")
    assert (code, "such as 512M or 4G" in error) == (2, True)
    code, _, error = run_command(*command, "900T")
    assert (code, "80%" in error) == (2, True)
    assert not (tmp_path / "out").exists()
    assert run_command(*command, "0.5GiB")[0] == 0


def test_without_a_bound_processes_share_most_memory() -> None:
    assert bound_memory(None, 10 << 30, 4) == Memory(2 << 30)
    assert bound_memory(None, 1 << 30, 64) == Memory(LEAST_BYTES)
    with pytest.raises(ConfigError, match="819M"):
        bound_memory("1G", 1 << 30, 1)


def test_buffers_follow_from_the_bound() -> None:
    small, large = Memory(LEAST_BYTES), Memory(8 << 30)
    assert small.fitting(100, 1 << 21) < large.fitting(100, 1 << 21) == 1 << 21
    assert small.fitting(1 << 40, 8) == 1
    assert small.fitting(100, 1 << 21) * 100 + OWN_BYTES < LEAST_BYTES


@pytest.mark.slow
def test_the_bound_may_change_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = real_paragraphs(60, 80)
    source = write_records(tmp_path / "in.jsonl", [*texts, *texts[::2], *(f"{text} more" for text in texts[::3])])
    monkeypatch.setattr(clusters, "BUCKET_DOCUMENTS", 30)
    monkeypatch.setattr(job, "LOOK_AGAIN_SECONDS", 0.0)
    options = DedupOptions(WHOLE, "minhash", num_permutations=64, cluster_by="representative")
    usual = run_dedup(source, tmp_path / "usual", "minhash", num_permutations=64, cluster_by="representative")
    assert usual["dropped"] >= 30
    bounds = cycle(Memory(OWN_BYTES + free_bytes) for free_bytes in (4_000, 20_000, 1 << 30))
    stages = ("read", "index", "sort", "compare", "join", "cluster", "represent", "assign", "list", "tally", None)
    for stage in stages:
        while True:  # what is missing with one bound may be there with another
            place = Place(LocalPool(1), memory=next(bounds))
            effort = Effort(1, silent, 100_000, place=place, stage=stage)
            try:
                report = dedup([str(source)], tmp_path / "changed", options, effort, False)
                break
            except Unfinished:
                continue
    assert report == usual
    assert folder_bytes(tmp_path / "changed") == folder_bytes(tmp_path / "usual")

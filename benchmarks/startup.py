"""How long from `megatrain train` to the first step, where does it go, and how does it grow with the ranks?

First the real command, with 1, 2, 4, 8 and 16 ranks on this machine: until the first line of a step is in
metrics.jsonl, by the parts that the run itself records. Where ranks share cores the wall's clock grows with them; the
CPU seconds of one rank do not. The floor: as many processes at once that only import torch and DeepSpeed, right after.
Sockets: TCP connections of rank 0 at its first step.

Then one rank of many, over torch's fake process group: what it computes by itself, and the collectives it takes part
in. Each costs log n messages on the critical path, so none of their numbers may grow with the ranks.

    python benchmarks/startup.py [--ranks 1 2 4 8 16] [--fake 64 1024 4096] [--turns 3]

Prints medians over turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import cpu_name, make_dataset
from megatrain.distributed.local_ranks import find_ranks

CONFIG = """
run: {{dir: {folder}/run}}
model: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 8,
  max_position_embeddings: 32, vocab_size: 304}}
data: {{train: [{{path: {folder}/data}}], seq_len: 32}}
train: {{steps: 1000000, global_batch_size: {batch}, micro_batch_size: 1}}
optimizer: {{lr: 1.0e-3}}
parallel: {parallel}
"""
LAYOUTS = {"data, ZeRO 1": "{zero_stage: 1}", "tensor 8 x pipeline 4 x data": "{tensor: 8, pipeline: 4}"}


def start_for_real(folder: Path, num_ranks: int) -> dict[str, float]:
    """Start `megatrain train`, end it after its first step; seconds by part, and what a rank used."""
    config = write_config(folder, LAYOUTS["data, ZeRO 1"], num_ranks)
    command = [sys.executable, "-m", "megatrain", "train", str(config), "--procs", str(num_ranks)]
    metrics, began = folder / "run" / "metrics.jsonl", time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    while not (steps := lines_with(metrics, "loss")):
        if process.poll() is not None:
            sys.exit(f"`{' '.join(command)}` ended with code {process.returncode}")
        time.sleep(0.01)
    ranks = find_ranks(lambda rank: process.pid in [parent.pid for parent in rank.parents()])
    first = next(rank for rank in ranks if rank.environ()["RANK"] == "0")
    parts = lines_with(metrics, "startup_seconds")[0]["startup_seconds"]
    seen = {
        **parts,
        "first step": steps[0]["time"] - began - sum(parts.values()),
        "all": steps[0]["time"] - began,
        "CPU s a rank": statistics.mean(sum(rank.cpu_times()[:2]) for rank in ranks),
        "sockets": len([found for found in first.net_connections("tcp") if found.status == psutil.CONN_ESTABLISHED]),
    }
    process.terminate()
    process.wait()
    floor = import_alone(num_ranks)
    return {**seen, "floor": floor, "all / floor": seen["all"] / floor}


def import_alone(num_processes: int) -> float:
    """Seconds until so many processes, all at once, have imported what each rank cannot do without."""
    command = [sys.executable, "-c", "import torch, deepspeed"]
    environment, began = {**os.environ, "DS_ACCELERATOR": "cpu"}, time.time()
    processes = [subprocess.Popen(command, env=environment) for _ in range(num_processes)]
    for process in processes:
        process.wait()
    return time.time() - began


def start_as_one_of_many(folder: Path, layout: str, num_ranks: int) -> dict[str, float]:
    """What rank 0 of so many does by itself until the first step: seconds by part; collectives it takes part in."""
    config = write_config(folder, LAYOUTS[layout], num_ranks)
    command = [sys.executable, str(Path(__file__).with_name("_startup_rank.py")), str(config), str(num_ranks)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode != 0:
        sys.exit(done.stderr[-3000:])
    seen = json.loads(done.stdout.splitlines()[-1])
    return {**seen["parts"], "CPU s": seen["cpu seconds"], "collectives": sum(seen["collectives"].values())}


def write_config(folder: Path, parallel: str, num_ranks: int) -> Path:
    """A run of its own."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run").mkdir()
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, batch=num_ranks, parallel=parallel))
    return config


def lines_with(metrics: Path, field: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a field."""
    written = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]
    return [line for line in lines if field in line]


def show(title: str, columns: dict[str, list[dict[str, float]]]) -> None:
    """Medians over turns, a column for each number of ranks."""
    table = Table(title=title, title_justify="left")
    table.add_column("seconds")
    for name in columns:
        table.add_column(name, justify="right")
    for part in next(iter(columns.values()))[0]:
        medians = [statistics.median(turn[part] for turn in turns if part in turn) for turns in columns.values()]
        digits = 0 if part in ("sockets", "collectives") else 3
        table.add_row(part, *(f"{median:.{digits}f}" for median in medians))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="real ones")
    parser.add_argument("--fake", type=int, nargs="*", default=[64, 1024, 4096], help="multiples of 32")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {given.turns} turns")
    with TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(Path(__file__).read_text() * 100)
        make_dataset(folder, [str(text)], 300)
        if given.ranks:
            turns = range(given.turns)
            show("megatrain train", {f"{n} rank(s)": [start_for_real(folder, n) for _ in turns] for n in given.ranks})
        for layout in LAYOUTS if given.fake else ():
            many = {
                f"of {n}": [start_as_one_of_many(folder, layout, n) for _ in range(given.turns)] for n in given.fake
            }
            show(f"one rank of many: {layout}", many)


if __name__ == "__main__":
    main()

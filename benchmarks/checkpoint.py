"""How long does a save hold training up, and how long until it is on disk? How long does a load take?

Real ranks (`--procs`) hold a run as `megatrain train` puts it together: bf16, ZeRO 1, optimizer state of real steps. In
turns, whose order alternates, each of these saves the same state, and then loads it:

- plain: every rank writes the bytes of its pieces from where they are into one file, and syncs file and folder; reads
  them into memory that it has. Nothing can be faster on this disk, and nothing is checked.
- megatrain: the trainer's own `CheckpointManager` and `restore`.
- DeepSpeed's save_checkpoint and load_checkpoint, of the very same engine.
- torch.distributed.checkpoint (DCP) of the same pieces, and its async_save.

Files of DeepSpeed are synced afterwards, which is counted: it does not do so itself. Each has its save before this one
still on disk; deleting that is counted for megatrain alone, which does it itself. Loads find the files in the page
cache, or (`cold`) dropped from it.

    python benchmarks/checkpoint.py [--procs 1] [--turns 7] [--folder DIR]

Prints medians and the range over turns, and the median of the ratios to plain in the same turn: by the clock, and of
the CPU time of rank 0, which says more where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
import torch.distributed.checkpoint as dcp

from benchmarks._machine import cpu_name, make_dataset
from megatrain.config import load
from megatrain.distributed.bootstrap import child_environment, export_rank, free_port, read_rank
from megatrain.train.assemble import assemble
from megatrain.train.checkpointing import CheckpointManager, restore

# 38 million parameters: 454 MB of fp32 weights and moments.
CONFIG = """
run: {{dir: {run_dir}}}
model: {{hidden_size: 640, intermediate_size: 1728, num_hidden_layers: 6, num_attention_heads: 10,
  num_key_value_heads: 5, max_position_embeddings: 64, vocab_size: 16384}}
data: {{train: [{{path: {data}}}], seq_len: 64}}
train: {{steps: 1000000, global_batch_size: 4, micro_batch_size: 2}}
optimizer: {{lr: 1.0e-3}}
schedule: {{type: constant}}
checkpoint: {{keep: 1}}
"""
NUM_STEPS = 2
SAVES = ("plain", "megatrain", "deepspeed", "dcp", "dcp async")
LOADS = ("plain", "megatrain", "deepspeed", "dcp")


class Moment(NamedTuple):
    """Seconds on the wall's clock, and of this process's CPU time."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Moment:
        """This one."""
        return cls(time.perf_counter(), time.process_time())


class Rank:
    """One rank: saves and loads in each way, and tells what it took."""

    def __init__(self, folder: Path) -> None:
        rank = read_rank()
        export_rank(rank)
        warnings.filterwarnings("ignore")
        config = load(folder / "config.yaml")
        self.folder, self.rank = folder, rank.rank
        self.run = assemble(config, rank)
        progress, _, _ = restore(self.run)
        batches = self.run.training_batches(self.run.order)
        for step in range(NUM_STEPS):
            count = batches.num_targets(step)
            result = self.run.engine.train_batch(batches.micro_batches(step), count, 1e-3)
            progress = progress.after_step(count, bool(result.skipped), progress.recent)
        batches.close()
        self.progress, self.saving = progress, CheckpointManager(self.run, progress.updates)
        self.saving.prepare()
        pieces = [(f"{f.shard.name}.{f.shard.start}.{f.kind}", f.data) for f in self.run.engine.state_fragments()]
        self.state = {f"rank{self.rank}.{name}": data for name, data in pieces}
        self.num_bytes = sum(data.nbytes for data in self.state.values())
        self.num_saves: Counter[str] = Counter()
        self.memory = memoryview(bytearray(self.num_bytes))

    def save(self, way: str) -> dict[str, float]:
        """Seconds that training would stand still, and seconds until all is on disk; CPU seconds of this rank."""
        self.num_saves[way] += 1
        target = self.saved(way)
        os.sync()
        self.run.groups.barrier()
        began = Moment.now()
        stalled: list[Moment] = []
        SAVE[way](self, target, lambda: stalled.append(Moment.now()))
        self.run.groups.barrier()
        ended = Moment.now()
        if self.rank == 0 and way != "megatrain":
            shutil.rmtree(self.saved(way, before=1), ignore_errors=True)
        until = stalled[0] if stalled else ended
        stall = max(self.run.groups.all_gather_object(until.wall - began.wall))
        return {
            "stall": stall,
            "stall cpu": until.cpu - began.cpu,
            "whole": ended.wall - began.wall,
            "whole cpu": ended.cpu - began.cpu,
        }

    def load(self, way: str, cold: bool) -> dict[str, float]:
        """Seconds until the state is there, and CPU seconds."""
        target = self.saved(way) if way != "megatrain" else self.folder / "run" / "checkpoints"
        if cold and self.rank == 0:
            drop_from_cache(target)
        self.run.groups.barrier()
        began = Moment.now()
        LOAD[way](self, target)
        self.run.groups.barrier()
        ended = Moment.now()
        return {"whole": ended.wall - began.wall, "whole cpu": ended.cpu - began.cpu}

    def saved(self, way: str, before: int = 0) -> Path:
        """Where a way's newest save is, or one before it."""
        return self.folder / f"{way.replace(' ', '-')}-{self.num_saves[way] - before}"


def save_plain(rank: Rank, target: Path, stalled: Callable[[], None]) -> None:
    target.mkdir(exist_ok=True)
    with (target / f"{rank.rank}").open("xb", buffering=0) as file:
        for data in rank.state.values():
            view = memoryview(data.numpy()).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    sync(target)


def save_megatrain(rank: Rank, target: Path, stalled: Callable[[], None]) -> None:
    rank.progress = replace(rank.progress, step=rank.progress.step + 1)
    rank.saving.begin(rank.progress, validation_loss=None, on_request=False)
    stalled()
    (outcome,) = rank.saving.finish()
    assert outcome.path is not None, rank.saving.problem


def save_deepspeed(rank: Rank, target: Path, stalled: Callable[[], None]) -> None:
    with quiet():
        rank.run.engine._sharding._deepspeed.save_checkpoint(str(target), tag="it")
    if rank.rank == 0:
        for path in [*target.rglob("*"), target]:
            sync(path)


def save_dcp(rank: Rank, target: Path, stalled: Callable[[], None]) -> None:
    dcp.save(rank.state, checkpoint_id=str(target))


def save_dcp_async(rank: Rank, target: Path, stalled: Callable[[], None]) -> None:
    future = dcp.async_save(rank.state, checkpoint_id=str(target))
    stalled()
    future.result()


def load_plain(rank: Rank, target: Path) -> None:
    with (target / f"{rank.rank}").open("rb", buffering=0) as file:
        view = rank.memory
        while view:
            view = view[file.readinto(view) :]


def load_megatrain(rank: Rank, target: Path) -> None:
    progress, _, problems = restore(rank.run)
    assert progress.step == rank.progress.step, problems


def load_deepspeed(rank: Rank, target: Path) -> None:
    with quiet():
        rank.run.engine._sharding._deepspeed.load_checkpoint(str(target), tag="it")


def load_dcp(rank: Rank, target: Path) -> None:
    dcp.load(rank.state, checkpoint_id=str(target))


SAVE: dict[str, Callable[[Rank, Path, Callable[[], None]], None]] = {
    "plain": save_plain,
    "megatrain": save_megatrain,
    "deepspeed": save_deepspeed,
    "dcp": save_dcp,
    "dcp async": save_dcp_async,
}
LOAD: dict[str, Callable[[Rank, Path], None]] = {
    "plain": load_plain,
    "megatrain": load_megatrain,
    "deepspeed": load_deepspeed,
    "dcp": load_dcp,
}


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the folder's files; they are synced by now."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints a line for each file."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def serve(folder: Path, answers: int) -> None:
    """Do what the lines of standard input ask for; rank 0 answers."""
    torch.set_num_threads(1)
    rank = Rank(folder)
    with os.fdopen(answers, "w") as out:
        answer: dict[str, float] = {"bytes": sum(rank.run.groups.all_gather_object(rank.num_bytes))}
        while True:
            if rank.rank == 0:
                print(json.dumps(answer), file=out, flush=True)
            line = sys.stdin.readline()
            if not line:
                break
            action, way, cold = json.loads(line)
            answer = rank.save(way) if action == "save" else rank.load(way, cold)
    os._exit(0)


class Ranks:
    """The processes, and one question at a time to all of them."""

    def __init__(self, num_ranks: int, folder: Path) -> None:
        receive, send = os.pipe()
        self._answers, self._logs, port = os.fdopen(receive), [], str(free_port())
        self._processes = []
        for rank in range(num_ranks):
            env = {**os.environ, **child_environment(num_ranks, has_gpu=False), "OMP_NUM_THREADS": "1"}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            env |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = (folder / f"rank-{rank}.log").open("w+")
            command = [sys.executable, __file__, "--rank", str(folder), str(send)]
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(
                    command, env=env, text=True, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[send]
                )
            )
        os.close(send)
        self.num_bytes = int(self._answer()["bytes"])

    def ask(self, action: str, way: str, cold: bool = False) -> dict[str, float]:
        """What rank 0 says of it."""
        for process in self._processes:
            print(json.dumps([action, way, cold]), file=process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._answers.readline()
        if not line:
            for log in self._logs:
                log.seek(0)
                print(log.read()[-3000:], file=sys.stderr)
            sys.exit("a rank failed")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """Let the processes go."""
        for process in self._processes:
            process.stdin.close()
            process.wait()


def prepare(folder: Path) -> None:
    """A dataset of a few words; the state does not depend on it."""
    text = folder / "text.txt"
    text.write_text(Path(__file__).read_text() * 3)
    data = make_dataset(folder, [str(text)], 300)
    (folder / "config.yaml").write_text(CONFIG.format(run_dir=folder / "run", data=data))


def measure(options: argparse.Namespace, folder: Path) -> None:
    prepare(folder)
    ranks = Ranks(options.procs, folder)
    print(f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.procs} rank(s) of one thread")
    print(
        f"{ranks.num_bytes / 1e6:.0f} MB of state, {options.turns} turns in alternation after one that is not counted"
    )
    first = {way: ranks.ask("save", way) for way in SAVES}
    print(f"first save of megatrain, into memory not used before: stall {first['megatrain']['stall']:.3f} s, ", end="")
    print(f"{first['megatrain']['stall'] / first['plain']['whole']:.2f} of the plain write before it")
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(options.turns):
        for way in SAVES[:: 1 if turn % 2 else -1]:
            seen.setdefault(("save", way), []).append(ranks.ask("save", way))
        for way in LOADS[:: 1 if turn % 2 else -1]:
            seen.setdefault(("load", way), []).append(ranks.ask("load", way))
            seen.setdefault(("load cold", way), []).append(ranks.ask("load", way, cold=True))
    ranks.end()
    for (action, way), answers in seen.items():
        for figure in ("stall", "whole") if way in ("megatrain", "dcp async") and action == "save" else ("whole",):
            report(f"{action} {way} {figure}", answers, seen[action, "plain"], figure)


def report(name: str, answers: list[dict[str, float]], plain: list[dict[str, float]], figure: str) -> None:
    values = [answer[figure] for answer in answers]
    pairs = list(zip(answers, plain, strict=True))
    ratio = statistics.median(answer[figure] / other["whole"] for answer, other in pairs)
    cpu = statistics.median(answer[f"{figure} cpu"] for answer in answers)
    cpu_ratio = statistics.median(answer[f"{figure} cpu"] / other["whole cpu"] for answer, other in pairs)
    spread = f"{statistics.median(values):6.3f} s ({min(values):.3f} to {max(values):.3f})"
    print(f"{name:<28} {spread}, {ratio:5.2f} of plain; CPU {cpu:.3f} s, {cpu_ratio:.2f} of plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; left out, the system's folder for such")
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "FD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        serve(Path(options.rank[0]), int(options.rank[1]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()

"""How fast is megatrain, under each engine, eager and compiled, beside bare PyTorch loops of the same model, eager and
compiled, or on several ranks beside DeepSpeed alone?

Each has processes of its own, in the environment that its users start it in; they train the same decoder (27M
parameters, 2,048 tokens a step on each rank, fused AdamW, clipping 1.0) in alternation, so that what else the machine
does meets all alike.
megatrain goes through its real assembly and loop: config, memory-mapped dataset, engine, metrics and TensorBoard, with
ZeRO 1. What it is compared with is written by hand: tokens already in memory, no logging. On one rank a loop with bf16
weights and fp32 master weights, eager and with each layer compiled, of which the faster one counts; on several
`deepspeed.initialize` with ZeRO 1 and fp32 sums of gradients, as DeepSpeed is used by itself.

    python benchmarks/train_step.py [--ranks 1] [--precision bf16] [--threads 2] [--turns 8] [--steps 4] [--compile on]

Prints the median time of a step of each, and the ratio of their rates: above 1, megatrain is faster.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
from torch import Tensor, nn

from benchmarks._bare_loop import BareModel, Shape
from benchmarks._machine import cpu_name, make_dataset
from megatrain.config import load
from megatrain.data import open_dataset
from megatrain.distributed.bootstrap import child_environment, export_rank, free_port, read_rank
from megatrain.distributed.signals import Requests
from megatrain.observe.metrics import StepMetrics
from megatrain.observe.observers import Observers
from megatrain.parallel.deepspeed import start_deepspeed
from megatrain.train.assemble import assemble
from megatrain.train.checkpointing import restore
from megatrain.train.trainer import Trainer

SHAPE = Shape(hidden=512, ffn=1376, layers=8, heads=8, kv_heads=4, vocab=8192, seq_len=512)
SEQ_LEN, BATCH = SHAPE.seq_len, 4
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIPPING = 1e-3, (0.9, 0.95), 0.1, 1.0

CONFIG = f"""
run: {{{{dir: {{run_dir}}}}}}
model: {{{{family: llama, hidden_size: {SHAPE.hidden}, intermediate_size: {SHAPE.ffn},
  num_hidden_layers: {SHAPE.layers}, num_attention_heads: {SHAPE.heads}, num_key_value_heads: {SHAPE.kv_heads},
  max_position_embeddings: {SEQ_LEN}}}}}
data: {{{{train: [{{{{path: {{data}}}}}}], seq_len: {SEQ_LEN}}}}}
train: {{{{steps: 10000, global_batch_size: {{batch_size}}, micro_batch_size: {BATCH // 2}, precision: {{precision}},
  gradient_clipping: {CLIPPING}, compile: '{{compile}}'}}}}
parallel: {{{{zero_stage: 1, engine: {{engine}}}}}}
optimizer: {{{{lr: {LEARNING_RATE}, betas: [{BETAS[0]}, {BETAS[1]}], weight_decay: {WEIGHT_DECAY}}}}}
schedule: {{{{type: constant}}}}
checkpoint: {{{{every_steps: 10000}}}}
"""


class Turns:
    """A worker's side of the alternation: it trains as many steps as it is asked for, tells their time, and waits."""

    def __init__(self, answers: int) -> None:
        self._answers = os.fdopen(answers, "w")

    def wait(self) -> None:
        """Wait for the next turn; without one the worker ends."""
        asked = sys.stdin.readline()
        if not asked:
            os._exit(0)
        self._num_steps = self._remaining = int(asked)
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def step_done(self) -> None:
        """One step more is done."""
        self._remaining -= 1
        if self._remaining == 0:
            wall = (time.perf_counter() - self._began) / self._num_steps
            cpu = (time.process_time() - self._cpu_began) / self._num_steps
            print(wall, cpu, file=self._answers, flush=True)
            self.wait()


class PacedObservers(Observers):
    """The run's real observers, which hold it after each step until the next is asked for."""

    def __init__(self, run_dir: Path, num_steps: int, turns: Turns) -> None:
        super().__init__(run_dir, num_steps)
        self._turns = turns

    def step(self, metrics: StepMetrics) -> None:
        """Record the step, then wait."""
        super().step(metrics)
        self._turns.step_done()


def train_megatrain(turns: Turns, precision: str, folder: Path, engine: str, compiled: str) -> None:
    """A rank of megatrain, put together as `megatrain train` does it, with its metrics and TensorBoard."""
    rank = read_rank()
    export_rank(rank)
    run_dir = folder / f"run_{engine}_{compiled}"
    config_file = folder / f"config_{engine}_{compiled}_{rank.rank}.yaml"
    sizes = {"batch_size": BATCH * rank.world_size, "precision": precision, "engine": engine, "compile": compiled}
    config_file.write_text(CONFIG.format(run_dir=run_dir, data=folder / "data", **sizes))
    run = assemble(load(config_file), rank)
    progress, _, _ = restore(run)
    observers = PacedObservers(run_dir, run.config.train.steps, turns)
    turns.wait()
    Trainer(run, progress, Requests(), observers).run()


def windows_of(folder: Path) -> list[Tensor]:
    dataset = open_dataset(folder / "data")
    return [torch.from_numpy(dataset.window(k * SEQ_LEN, SEQ_LEN + 1).astype("int64")) for k in range(64 * BATCH)]


def train_deepspeed(turns: Turns, precision: str, folder: Path) -> None:
    """A rank of DeepSpeed alone: ZeRO 1, two micro-batches a step, whose boundaries it manages."""
    import deepspeed  # not for the bare loop

    rank = read_rank()
    export_rank(rank)
    start_deepspeed(300.0)
    torch.manual_seed(0)
    model = BareModel(SHAPE).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    settings = {
        "train_batch_size": BATCH * rank.world_size,
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    windows = windows_of(folder)
    turns.wait()
    for k in itertools.count():
        for half in range(2):
            first = (2 * (k * rank.world_size + rank.rank) + half) * (BATCH // 2) % len(windows)
            tokens = torch.stack(windows[first : first + BATCH // 2])
            loss = engine(tokens[:, :-1], tokens[:, 1:])
            engine.backward(loss)
            engine.step()
        loss.item()
        turns.step_done()


def train_bare(turns: Turns, precision: str, folder: Path, *, is_compiled: bool) -> None:
    """The bare loop."""
    torch.manual_seed(0)
    model = BareModel(SHAPE)
    for layer in model.layers if is_compiled else ():
        layer.compile()
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    if precision == "bf16":
        model.to(torch.bfloat16)
    else:
        masters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    windows = windows_of(folder)
    turns.wait()
    for k in itertools.count():
        for half in range(2):
            first = (2 * k + half) * (BATCH // 2) % len(windows)
            tokens = torch.stack(windows[first : first + BATCH // 2])
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 2
            loss.backward()
            if precision == "bf16":
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    gradient = parameter.grad.float()
                    master.grad = gradient if master.grad is None else master.grad + gradient
                    parameter.grad = None
        nn.utils.clip_grad_norm_(masters, CLIPPING)
        optimizer.step()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), masters)
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        turns.step_done()


ENGINES = {
    f"megatrain, {engine}{', compiled' * (compiled == 'on')}": partial(
        train_megatrain, engine=engine, compiled=compiled
    )
    for engine in ("deepspeed", "fsdp2")
    for compiled in ("off", "on")
}
BARE = {
    "bare loop": partial(train_bare, is_compiled=False),
    "bare loop, compiled": partial(train_bare, is_compiled=True),
}
WORKERS = {**ENGINES, "DeepSpeed alone": train_deepspeed, **BARE}


class Worker:
    """Processes, one a rank, that train one of the loops when they are told to."""

    def __init__(self, name: str, environment: dict[str, str], options: argparse.Namespace, folder: Path) -> None:
        ranks = [str(rank) for rank in range(options.ranks)]
        threads = str(max(options.threads // options.ranks, 1))
        environment |= {"OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(options.ranks))
        self._log = (folder / f"{name}.log").open("w+")
        self._answers = []
        self._processes = []
        for rank in ranks:
            reader, writer = os.pipe()  # standard output is for what the trainer shows
            self._answers.append(os.fdopen(reader))
            words = ["--precision", options.precision, "--worker", name, str(folder), str(writer)]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *words],
                    env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=self._log,
                    stderr=self._log,
                    pass_fds=[writer],
                )
            )
            os.close(writer)

    def turn(self, num_steps: int) -> tuple[float, float]:
        """Train ``num_steps``: wall seconds of one, of the slowest rank, and CPU seconds, of all."""
        for process in self._processes:
            print(num_steps, file=process.stdin, flush=True)
        answers = [file.readline().split() for file in self._answers]
        if not all(answers):
            self.end()
            self._log.seek(0)
            sys.exit(f"The worker failed:\n{self._log.read()[-3000:]}")
        return max(float(wall) for wall, _ in answers), sum(float(cpu) for _, cpu in answers)

    def end(self) -> None:
        """Let the processes go."""
        for process in self._processes:
            process.kill()
            process.wait()


def compare(options: argparse.Namespace) -> None:
    """Let all train in alternation and print what came out."""
    with TemporaryDirectory() as folder:
        # This Python installation's own sources: real text, a real vocabulary.
        library = Path(sysconfig.get_path("stdlib"))
        make_dataset(Path(folder), [str(library / "*.py"), str(library / "asyncio" / "*.py")], SHAPE.vocab)
        tuned = child_environment(options.ranks, has_gpu=False)  # what `megatrain train` starts its ranks with
        references = ["DeepSpeed alone"] if options.ranks > 1 else list(BARE)
        environment = tuned if options.ranks > 1 else dict(os.environ)
        chosen = [name for name in ENGINES if ("on" if name.endswith("compiled") else "off") in options.compile]
        environments = {**dict.fromkeys(chosen, tuned), **dict.fromkeys(references, environment)}
        workers = {name: Worker(name, dict(env), options, Path(folder)) for name, env in environments.items()}
        for worker in workers.values():
            worker.turn(3)  # threads, buffers and the optimizer's state come into being
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for k in range(options.turns):
            # One goes first, then the other, so that none always follows a pause.
            for name in list(workers)[:: 1 if k % 2 else -1]:
                turns[name].append(workers[name].turn(options.steps))
        for worker in workers.values():
            worker.end()
    reference = min(references, key=lambda name: statistics.median(wall for wall, _ in turns[name]))
    report(turns, reference, options)


def report(turns: dict[str, list[tuple[float, float]]], reference: str, options: argparse.Namespace) -> None:
    num_tokens = SEQ_LEN * BATCH * options.ranks
    num_parameters = sum(parameter.numel() for parameter in BareModel(SHAPE).parameters())
    print(f"{cpu_name()}, {options.ranks} rank(s), {options.threads} threads, torch {torch.__version__}, ", end="")
    print(f"{options.precision}\n{num_parameters / 1e6:.1f}M parameters, {num_tokens} tokens a step")
    print(f"{options.turns} turns of {options.steps} steps each, in alternation")
    for name, measured in turns.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name:<30} {wall:.3f} s a step, {num_tokens / wall:,.0f} tokens/s, {cpu:.3f} CPU-s a step (medians)")
    for name in [name for name in turns if name in ENGINES]:
        pairs = list(zip(turns[name], turns[reference], strict=True))
        ratios = [other[0] / mine[0] for mine, other in pairs]
        cpu_ratio = statistics.median(other[1] / mine[1] for mine, other in pairs)
        print(
            f"{name}, of the rate of the {reference}: {', '.join(f'{ratio:.2f}' for ratio in ratios)} by turn; ", end=""
        )
        print(f"medians {statistics.median(ratios):.3f} in tokens/s, {cpu_ratio:.3f} in CPU time")


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast is megatrain, under each engine, beside a loop by hand?")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"], help="of megatrain")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "FOLDER", "FD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder, answers = options.worker
        WORKERS[name](Turns(int(answers)), options.precision, Path(folder))
    else:
        compare(options)


if __name__ == "__main__":
    main()

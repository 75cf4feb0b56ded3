"""How fast is one rank of megatrain beside a bare PyTorch loop of the same model?

Each is a process of its own, in the environment that its users start it in; they train the same decoder (27M
parameters, 2,048 tokens a step, fused AdamW, clipping 1.0) in alternation, so that what else the machine does meets
both alike.
megatrain goes through its real assembly and loop: config, memory-mapped dataset, DeepSpeed engine, metrics and
TensorBoard. The bare loop is what one writes by hand: eager, bf16 weights with fp32 master weights, tokens already in
memory, no logging.

    python benchmarks/train_step.py [--precision bf16] [--threads 2] [--turns 8] [--steps 4]

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
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks._machine import cpu_name, make_dataset
from megatrain.config import load
from megatrain.data import open_dataset
from megatrain.distributed.bootstrap import child_environment, export_rank, read_rank
from megatrain.distributed.signals import Requests
from megatrain.observe.metrics import StepMetrics
from megatrain.observe.observers import Observers
from megatrain.train.assemble import assemble
from megatrain.train.checkpointing import restore
from megatrain.train.trainer import Trainer

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 512, 1376, 8, 8, 4, 8192
SEQ_LEN, BATCH = 512, 4
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIPPING = 1e-3, (0.9, 0.95), 0.1, 1.0
HEAD_DIM = HIDDEN // HEADS

CONFIG = f"""
run: {{{{dir: {{run_dir}}}}}}
model: {{{{family: llama, hidden_size: {HIDDEN}, intermediate_size: {FFN}, num_hidden_layers: {LAYERS},
  num_attention_heads: {HEADS}, num_key_value_heads: {KV_HEADS}, max_position_embeddings: {SEQ_LEN}}}}}
data: {{{{train: [{{{{path: {{data}}}}}}], seq_len: {SEQ_LEN}}}}}
train: {{{{steps: 10000, global_batch_size: {BATCH}, micro_batch_size: {BATCH}, precision: {{precision}},
  gradient_clipping: {CLIPPING}}}}}
optimizer: {{{{lr: {LEARNING_RATE}, betas: [{BETAS[0]}, {BETAS[1]}], weight_decay: {WEIGHT_DECAY}}}}}
schedule: {{{{type: constant}}}}
checkpoint: {{{{every_steps: 10000}}}}
"""


class BareLayer(nn.Module):
    """A pre-norm decoder layer: grouped-query attention with rotary positions, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.mlp_norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, hidden] to the same."""
        y = self.attention_norm(x)
        q, k, v = (
            proj(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class BareModel(nn.Module):
    """A Llama-shaped decoder with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(BareLayer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(SEQ_LEN), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


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


def train_megatrain(turns: Turns, precision: str, folder: Path) -> None:
    """One rank of megatrain, put together as `megatrain train` does it, with its metrics and TensorBoard."""
    config_file = folder / "config.yaml"
    config_file.write_text(CONFIG.format(run_dir=folder / "run", data=folder / "data", precision=precision))
    rank = read_rank()
    export_rank(rank)
    run = assemble(load(config_file), rank)
    progress, _, _ = restore(run)
    observers = PacedObservers(folder / "run", run.config.train.steps, turns)
    turns.wait()
    Trainer(run, progress, Requests(), observers).run()


def train_bare(turns: Turns, precision: str, folder: Path) -> None:
    """The bare loop."""
    torch.manual_seed(0)
    model = BareModel()
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    if precision == "bf16":
        model.to(torch.bfloat16)
    else:
        masters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    dataset = open_dataset(folder / "data")
    windows = [torch.from_numpy(dataset.window(k * SEQ_LEN, SEQ_LEN + 1).astype("int64")) for k in range(64 * BATCH)]
    turns.wait()
    for k in itertools.count():
        first = k * BATCH % len(windows)
        tokens = torch.stack(windows[first : first + BATCH])
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        if precision == "bf16":
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(masters, CLIPPING)
        optimizer.step()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), masters)
        model.zero_grad(set_to_none=True)
        loss.item()
        turns.step_done()


WORKERS = {"megatrain": train_megatrain, "bare": train_bare}


class Worker:
    """A process that trains one of the two loops, when it is told to."""

    def __init__(self, name: str, environment: dict[str, str], options: argparse.Namespace, folder: Path) -> None:
        environment |= {"OMP_NUM_THREADS": str(options.threads)}
        reader, writer = os.pipe()  # standard output is for what the trainer shows
        self._answers, self._log = os.fdopen(reader), (folder / f"{name}.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--precision", options.precision, "--worker", name, str(folder), str(writer)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[writer],
        )
        os.close(writer)

    def turn(self, num_steps: int) -> tuple[float, float]:
        """Train ``num_steps``: wall seconds and CPU seconds of one."""
        print(num_steps, file=self._process.stdin, flush=True)
        answer = self._answers.readline().split()
        if not answer:
            self._log.seek(0)
            sys.exit(f"The worker failed:\n{self._log.read()[-3000:]}")
        return float(answer[0]), float(answer[1])

    def end(self) -> None:
        """Let the process go."""
        self._process.stdin.close()
        self._process.wait()


def compare(options: argparse.Namespace) -> None:
    """Let both train in alternation and print what came out."""
    with TemporaryDirectory() as folder:
        # This Python installation's own sources: real text, a real vocabulary.
        library = Path(sysconfig.get_path("stdlib"))
        make_dataset(Path(folder), [str(library / "*.py"), str(library / "asyncio" / "*.py")], VOCAB)
        tuned = child_environment(1, has_gpu=False)  # what `megatrain train` starts its ranks with
        workers = {
            "megatrain": Worker("megatrain", tuned, options, Path(folder)),
            "bare": Worker("bare", dict(os.environ), options, Path(folder)),
        }
        for worker in workers.values():
            worker.turn(3)  # threads, buffers and the optimizer's state come into being
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for k in range(options.turns):
            # One goes first, then the other, so that neither always follows a pause.
            for name in list(workers)[:: 1 if k % 2 else -1]:
                turns[name].append(workers[name].turn(options.steps))
        for worker in workers.values():
            worker.end()
    report(turns, options)


def report(turns: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    num_tokens = SEQ_LEN * BATCH
    num_parameters = sum(parameter.numel() for parameter in BareModel().parameters())
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {options.precision}")
    print(f"{num_parameters / 1e6:.1f}M parameters, {num_tokens} tokens a step")
    print(f"{options.turns} turns of {options.steps} steps each, in alternation")
    for name, measured in turns.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name:<10} {wall:.3f} s a step, {num_tokens / wall:,.0f} tokens/s, {cpu:.3f} CPU-s a step (medians)")
    pairs = list(zip(turns["megatrain"], turns["bare"], strict=True))
    ratios = [bare[0] / mine[0] for mine, bare in pairs]
    cpu_ratio = statistics.median(bare[1] / mine[1] for mine, bare in pairs)
    print(f"by turn    {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"ratio      {statistics.median(ratios):.3f} in tokens/s, {cpu_ratio:.3f} in CPU time (medians over turns)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "FOLDER", "FD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder, answers = options.worker
        WORKERS[name](Turns(int(answers)), options.precision, Path(folder))
    else:
        compare(options)


if __name__ == "__main__":
    main()

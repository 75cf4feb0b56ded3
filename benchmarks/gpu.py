"""How fast does one GPU train, and in how much memory, beside a bare compiled PyTorch loop of the same model?

For each model a process trains it as megatrain does (its assembly, loop, metrics; the dataset memory-mapped), one as a
bare loop does: `torch.compile` of each layer, tokens on the device, bf16 weights with fp32 masters and fp32 sums of
gradients, fused AdamW, the same clipping and micro-batches. It prints tokens/s and MFU of both, the peak of allocated
memory beside `megatrain plan`'s, and how far fp32 losses are from the CPU's.

    python benchmarks/gpu.py [--models 160m 0.5b 1.5b 3b] [--engines deepspeed fsdp2] [--set KEY=VALUE]... [--steps 12]

Without a GPU it says so, and rehearses at a tiny size with `--tiny`: the figures mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks._bare_loop import BareModel, Shape
from benchmarks._gpu_models import MODELS, TINY, VOCAB, config_of
from benchmarks._machine import cpu_name, make_dataset
from megatrain.config import RunConfig, load
from megatrain.data import open_dataset
from megatrain.distributed.bootstrap import child_environment, export_rank, free_port, read_rank
from megatrain.distributed.signals import Requests
from megatrain.observe.metrics import StepMetrics
from megatrain.observe.observers import Observers
from megatrain.plan.flops import flops_per_token, num_parameters
from megatrain.plan.hardware import find_device
from megatrain.plan.memory import rank_memory
from megatrain.plan.stage_model import stage_models
from megatrain.train.assemble import assemble
from megatrain.train.checkpointing import restore
from megatrain.train.trainer import Trainer

TARGET_MFU = {"160m": 0.40, "0.5b": 0.47, "1.5b": 0.55, "3b": 0.57}
"""On one H100 in bf16, from published figures."""
NUM_WARM = 4
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")


class Enough(Exception):
    """All steps that were asked for are done."""


class TimedObservers(Observers):
    """The run's real observers, which end it after so many steps."""

    def __init__(self, run_dir: Path, num_steps: int) -> None:
        super().__init__(run_dir, 10000)
        self._num_steps, self._last = num_steps, time.perf_counter()
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, metrics: StepMetrics) -> None:
        """Record the step, and when it ended."""
        super().step(metrics)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.losses.append(metrics.loss)
        self._last = now
        if len(self.seconds) == self._num_steps:
            raise Enough


def train_megatrain(config_file: Path, num_steps: int) -> dict[str, Any]:
    """Train as megatrain does: seconds and loss of each step."""
    rank = read_rank()
    export_rank(rank)
    run = assemble(load(config_file), rank)
    progress, _, _ = restore(run)
    observers = TimedObservers(Path(run.config.run.dir), num_steps)
    try:
        Trainer(run, progress, Requests(), observers).run()
    except Enough:
        return {"seconds": observers.seconds, "losses": observers.losses}
    raise AssertionError("a run of so many steps does not end by itself")


def train_bare(config: RunConfig, shape: Shape, num_steps: int) -> dict[str, Any]:
    """The bare loop, compiled where there is a GPU: seconds and loss of each step."""
    size, seq_len = config.train.micro_batch_size, shape.seq_len
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = BareModel(shape).to(torch.bfloat16 if HAS_GPU else torch.float32)
    if HAS_GPU:
        for layer in model.layers:
            layer.compile(dynamic=False)
    parameters = list(model.parameters())
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in parameters]
    sums = [torch.zeros_like(master) for master in masters]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dataset = open_dataset(config.data.train[0].path)
    count = min((dataset.num_tokens - 1) // seq_len, 32 * size)
    windows = [torch.from_numpy(dataset.window(k * seq_len, seq_len + 1).astype("int64")) for k in range(count)]
    tokens = torch.stack(windows).to(DEVICE)
    found: dict[str, Any] = {"seconds": [], "losses": []}
    for step in range(num_steps):
        began, total = time.perf_counter(), torch.zeros((), device=DEVICE)
        for half in range(2):
            rows = torch.arange(size, device=DEVICE) + (2 * step + half) * size
            chosen = tokens[rows % count]
            loss = model(chosen[:, :-1], chosen[:, 1:]) / 2
            loss.backward()
            total += loss.detach()
            torch._foreach_add_(sums, [parameter.grad for parameter in parameters])
            model.zero_grad(set_to_none=True)
        for master, gradient in zip(masters, sums, strict=True):
            master.grad = gradient
        nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
            torch._foreach_zero_(sums)
        found["losses"].append(total.item())
        found["seconds"].append(time.perf_counter() - began)
    return found


def run_case(name: str, config: dict[str, Any], shape: Shape, options: argparse.Namespace, cpu: bool) -> dict[str, Any]:
    """Train in a process of its own: its answer, with the median time of a step."""
    run_dir = Path(config["run"]["dir"])
    config_file, answer = run_dir.with_suffix(".json"), run_dir.with_suffix(".answer")
    config_file.write_text(json.dumps(config))
    environment = child_environment(1, has_gpu=HAS_GPU and not cpu) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
        **(dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "") if cpu else {}),
    }
    words = ["--steps", str(options.steps), "--worker", name, str(config_file), str(answer)]
    ended = subprocess.run(
        [sys.executable, __file__, *words], env={**os.environ, **environment}, capture_output=True, text=True
    )
    if ended.returncode != 0:
        return {"problem": (ended.stderr or ended.stdout).strip().splitlines()[-1][:200]}
    found: dict[str, Any] = json.loads(answer.read_text())
    found["step"] = statistics.median(found["seconds"][NUM_WARM:])
    return found


def work(name: str, config_file: Path, answer: Path, num_steps: int) -> None:
    """A worker's part."""
    config = load(config_file)
    model = config.model
    shape = Shape(
        model.hidden_size,
        model.sizes["ffn"],
        model.num_hidden_layers,
        model.num_attention_heads,
        model.kv_heads,
        model.sizes["vocab"],
        config.data.seq_len,
    )
    found = train_megatrain(config_file, num_steps) if name == "megatrain" else train_bare(config, shape, num_steps)
    found["peak"] = torch.cuda.max_memory_allocated() if HAS_GPU else None
    answer.write_text(json.dumps(found))
    os._exit(0)  # what is still prepared in the background is not waited for


def override(config: dict[str, Any], settings: list[str]) -> None:
    """Lay SECTION.KEY=VALUE over a config, values in JSON."""
    for setting in settings:
        path, _, value = setting.partition("=")
        section, key = path.split(".")
        config[section] = {**config.get(section, {}), key: json.loads(value)}


def row(model: str, loop: str, config: dict[str, Any], found: dict[str, Any], bare_step: float | None) -> list[str]:
    """Of the table: what a loop reached."""
    checked = RunConfig.model_validate(config)
    seq_len, step = checked.data.seq_len, found["step"]
    rate = checked.train.micro_batch_size * 2 * seq_len / step
    peak_flops = find_device(torch.cuda.get_device_name()).peak_flops("bf16") if HAS_GPU else None
    figures = [
        f"{step:.3f}",
        f"{rate:,.0f}",
        f"{rate * flops_per_token(checked.model, seq_len) / peak_flops:.1%}" if peak_flops else "-",
        f"{TARGET_MFU[model]:.0%}" if model in TARGET_MFU else "-",
        f"{bare_step / step:.3f}" if bare_step and loop != "bare" else "-",
        f"{found['peak'] / 1e9:.2f}" if found["peak"] else "-",
        f"{rank_memory(stage_models(checked, 1)[0]).peak_bytes / 1e9:.2f}" if loop != "bare" else "-",
    ]
    return [f"{model} ({num_parameters(checked.model) / 1e9:.2f}B)", loop, *figures]


def compare_loops(folder: Path, options: argparse.Namespace) -> Table:
    """Speed and memory of each model in each loop."""
    table = Table("model", "loop", "s a step", "tokens/s", "MFU", "target", "of the bare loop", "peak GB", "plan GB")
    precision = "bf16" if HAS_GPU else "fp32"
    for model in ["tiny"] if options.tiny else options.models:
        shape, micro_batch = MODELS.get(model, (TINY, 2))
        bare_step = None
        for loop in ("bare", *options.engines):
            engine = "deepspeed" if loop == "bare" else loop
            config = config_of(shape, micro_batch, folder, f"{model}-{loop}", engine, precision)
            if loop != "bare":
                override(config, options.set)
            found = run_case("bare" if loop == "bare" else "megatrain", config, shape, options, cpu=False)
            if "problem" in found:
                table.add_row(model, loop, found["problem"])
                continue
            bare_step = found["step"] if loop == "bare" else bare_step
            table.add_row(*row(model, loop, config, found, bare_step))
    return table


def compare_losses(folder: Path, engine: str, options: argparse.Namespace) -> str:
    """How far fp32 losses of a tiny model are from the CPU's."""
    answers = []
    for place in ("gpu", "cpu"):
        config = config_of(TINY, 2, folder, f"fp32-{engine}-{place}", engine, "fp32")
        config["model"]["vocab_size"] = None
        answers.append(run_case("megatrain", config, TINY, options, cpu=place == "cpu"))
    if problems := [answer["problem"] for answer in answers if "problem" in answer]:
        return f"{engine}, fp32: {problems[0]}"
    distance = max(abs(here - there) for here, there in zip(*(answer["losses"] for answer in answers), strict=True))
    return f"{engine}, fp32: losses of {options.steps} steps within {distance:.1e} of the CPU's"


def compare(options: argparse.Namespace) -> None:
    """Train all cases, one after the other, and print what came out."""
    console = Console(width=150)
    name = torch.cuda.get_device_name() if HAS_GPU else cpu_name()
    console.print(f"{name}, torch {torch.__version__}; medians of {options.steps - NUM_WARM} steps after {NUM_WARM}")
    with TemporaryDirectory() as folder:
        library = Path(sysconfig.get_path("stdlib"))
        texts = [str(library / "*.py"), str(library / "asyncio" / "*.py")]
        make_dataset(Path(folder), texts, TINY.vocab if options.tiny else VOCAB)
        console.print(compare_loops(Path(folder), options))
        for engine in options.engines:
            console.print(compare_losses(Path(folder), engine, options))


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast does one GPU train, and in how much memory?")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--engines", nargs="+", choices=["deepspeed", "fsdp2"], default=["deepspeed", "fsdp2"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of megatrain's config")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "CONFIG", "ANSWER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, config_file, answer = options.worker
        work(name, Path(config_file), Path(answer), options.steps)
    elif not HAS_GPU and not options.tiny:
        sys.exit("There is no GPU here. `--tiny` rehearses on the CPU; its figures mean nothing.")
    else:
        compare(options)


if __name__ == "__main__":
    main()

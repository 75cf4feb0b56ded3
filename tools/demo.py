"""What `make demo` runs: everything megatrain does, once, on real text, in a folder of its own.

Each command is shown before it runs and can be typed by hand in that folder. Half-way through training one rank is
killed with SIGKILL, and the run is started again, by DeepSpeed's launcher. A demo that was broken off goes on at the
next start; one that came to its end starts over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from megatrain.config import recipes
from megatrain.distributed.bootstrap import child_environment
from megatrain.errors import EXIT_RANK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

RECIPE = "tiny_cpu"
VOCAB_SIZE = 4096
DATASETS = ("code", "prose", "code-val", "prose-val")
NUM_RANKS = 2
LEAST_GAIN_NATS = 1.5
PROMPT = "def read_lines(path):\n"


class Demo:
    """The stages in order, and how long each took."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seconds: dict[str, float] = {}
        config = yaml.safe_load(recipes.text(RECIPE))
        self._run_dir = config["run"]["dir"]
        self._num_steps, self._save_every = config["train"]["steps"], config["checkpoint"]["every_steps"]
        commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": commands}
        # On every machine the ranks share the CPU, even where there are GPUs, and under every launcher alike.
        shared = child_environment(NUM_RANKS, has_gpu=False)
        self._environment |= {name: shared[name] for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")}

    def run(self) -> None:
        """All of it."""
        self._make_datasets()
        repeated = self._train()
        figures = self._evaluate()
        self._sum_up(repeated, figures)

    def _make_datasets(self) -> None:
        if not (self._folder / "tokenizer.json").exists():  # else it would be newer than the datasets made of it
            with self._stage(
                "corpus", "Two kinds of real text: this Python's own sources, and what they say of themselves"
            ):
                self._command("megatrain-data", "corpus", "corpus")
        texts = [f"corpus/{name}.jsonl.zst" for name in DATASETS]
        with self._stage("tokenizer", "A byte-level BPE tokenizer, trained on both"):
            size = ["--vocab-size", str(VOCAB_SIZE), "--out", "tokenizer.json"]
            self._command("megatrain-data", "train-tokenizer", *texts[:2], *size)
        with self._stage("tokenize", "Text to Arrow: two datasets to train on, and what was held out of each"):
            for name, text in zip(DATASETS, texts, strict=True):
                self._command(
                    "megatrain-data", "tokenize", text, "--tokenizer", "tokenizer.json", "--out", f"data/{name}"
                )

    def _train(self) -> dict[int, tuple[float, float]]:
        """Train, be killed, train on; the losses that were computed twice, by step."""
        options = [RECIPE, "observe.log_every_steps=5"]
        command = ["megatrain", "train", "--procs", str(NUM_RANKS), *options]
        other = ["deepspeed", "--quiet", "--num_accelerators", str(NUM_RANKS), "--module", "megatrain.train", *options]
        # A little behind the checkpoint at half-way, so that steps are lost and done again.
        halfway = self._num_steps // 2 // self._save_every * self._save_every
        lost: dict[int, float] = {}
        if self._last_step() < halfway:
            with self._stage("train", f"Train on {NUM_RANKS} ranks, on the mixture of both, until one rank is killed"):
                process = self._start(*command)
                self._kill_a_rank(process, after_step=halfway + self._save_every // 4)
                if _wait(process) != EXIT_RANK:
                    sys.exit(f"Training should have ended with code {EXIT_RANK} when a rank was killed.")
                lost = self._losses()
        with self._stage("resume", "Again, by DeepSpeed's launcher this time: it goes on from the newest checkpoint"):
            self._command(*other)
        return self.done_twice(lost)

    def done_twice(self, lost: Mapping[int, float]) -> dict[int, tuple[float, float]]:
        """The losses, before the kill and after, of each step done again that both runs have logged."""
        final, resumed_from = self._losses(), self._resumed_from()
        return {step: (loss, final[step]) for step, loss in lost.items() if step > resumed_from and step in final}

    def _evaluate(self) -> dict[str, dict[str, float]]:
        figures = {}
        with self._stage("evaluate", "Loss and bits per byte on what was held out"):
            for name in DATASETS[2:]:
                text = self._command("megatrain", "eval", self._run_dir, "--data", f"data/{name}", "--json", quiet=True)
                figures[name] = json.loads(text)
                print(f"{name}: {figures[name]['bits_per_byte']:.3f} bits per byte", flush=True)
        with self._stage("generate", "The model goes on from a prompt"):
            self._command("megatrain", "generate", self._run_dir, "--prompt", PROMPT, "--max-new-tokens", "80")
        with self._stage("report", "The run on one page"):
            self._command("megatrain", "report", self._run_dir, "--out", "report.html")
        return figures

    def _sum_up(self, repeated: dict[int, tuple[float, float]], figures: dict[str, dict[str, float]]) -> None:
        losses = self._losses()
        step, first = next(iter(losses.items()))
        last = statistics.mean(list(losses.values())[-5:])
        gain = first - last
        print("\n=== Done")
        for name, seconds in self._seconds.items():
            print(f"{name:12}{seconds:7.0f} s")
        print(f"{'together':12}{sum(self._seconds.values()):7.0f} s\n")
        print(f"loss         {first:.2f} at step {step}, {last:.2f} over the last 5 lines: down by {gain:.2f} nats")
        for name, figure in figures.items():
            print(f"{name:12} {figure['bits_per_byte']:.3f} bits per byte, perplexity {figure['perplexity']:.1f}")
        print(f"resumed      from the checkpoint of step {self._resumed_from()}")
        if repeated:
            differing = [step for step, (before, after) in repeated.items() if before != after]
            steps = ", ".join(map(str, repeated))
            print(
                f"done twice   step {steps}: {'DIFFERENT losses' if differing else 'the same losses to the last bit'}"
            )
        print(f"\nLook at      {self._folder / 'report.html'}")
        print(f"             tensorboard --logdir {self._folder / self._run_dir}")
        if gain < LEAST_GAIN_NATS or any(before != after for before, after in repeated.values()):
            sys.exit("The demo did not do what it should: see the lines above.")

    def _kill_a_rank(self, process: subprocess.Popen[str], after_step: int) -> None:
        while process.poll() is None and self._last_step() < after_step:
            time.sleep(0.1)
        for rank in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            if rank.environ().get("RANK") == "1":
                print(f"\n--- kill -KILL {rank.pid} (rank 1)\n", flush=True)
                rank.send_signal(signal.SIGKILL)

    def _lines(self) -> list[dict[str, Any]]:
        path = self._folder / self._run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self._lines() if "loss" in line}

    def _last_step(self) -> int:
        return max(self._losses(), default=0)

    def _resumed_from(self) -> int:
        return max((line["step"] for line in self._lines() if line.get("event") == "resume"), default=0)

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        print(f"\n=== {title}", flush=True)
        began = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - began

    def _start(self, *command: str, quiet: bool = False) -> subprocess.Popen[str]:
        print(f"$ {_typed(command)}", flush=True)
        output = subprocess.PIPE if quiet else None
        return subprocess.Popen(command, cwd=self._folder, env=self._environment, text=True, stdout=output)

    def _command(self, *command: str, quiet: bool = False) -> str:
        process = self._start(*command, quiet=quiet)
        text = process.stdout.read() if process.stdout else ""
        if code := _wait(process):
            sys.exit(f"The demo stops here: that command ended with code {code}. `make demo` again goes on.")
        return text


def _wait(process: subprocess.Popen[str]) -> int:
    """The exit code. Ctrl-C has reached the command too: it is left the time to save its state."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        sys.exit("Broken off. `make demo` again goes on.")


def _typed(command: Sequence[str]) -> str:
    return " ".join(f"$'{word.encode('unicode_escape').decode()}'" if " " in word else word for word in command)


def main() -> None:
    """Run the demo in the folder that the command line names, made if it is missing."""
    folder = Path(sys.argv[1]).resolve()
    if (folder / "report.html").exists():  # the last thing a demo writes
        print(f"{folder} holds a demo that has come to its end: it is removed, and starts over.")
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    Demo(folder).run()


if __name__ == "__main__":
    main()

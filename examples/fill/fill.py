"""What `make example-fill` runs: a small model learns to fill gaps in the functions of Python's standard library.

Two models are trained on the same functions with the same seed: one from left to right alone, one with most of its
functions rearranged for fill-in-the-middle. Each is asked for names in functions from files that are held out.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
import sys
import sysconfig
import textwrap
import time
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from examples.commands import enter, number_of, run, shown, write_lines
from megatrain.tasks.bootstrap import Figure, bootstrap, difference, mean

STEPS = 1200
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
CONFIG = """
model: {family: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_attention_heads: 4,
  num_key_value_heads: 4, max_position_embeddings: 512, tie_word_embeddings: true}
data: {train: [{path: train}], seq_len: 256, packing: best_fit, document_mask: true}
train: {global_batch_size: 16, micro_batch_size: 8, precision: fp32}
optimizer: {lr: 4.0e-3}
schedule: {type: cosine}
parallel: {zero_stage: 0}
checkpoint: {every_steps: 10000}
observe: {log_every_steps: 50, tensorboard: false}
"""
WAYS = {"left to right": "{{ before }}", "both sides": PREFIX + SUFFIX + "{{ behind }}" + MIDDLE + "{{ before }}"}
METRICS = ("exact_match", "edit_similarity")
MODELS = {"plain": "null", "filling": "{rate: 0.9, spm_rate: 1.0}"}


class Function(NamedTuple):
    """``file``: below the standard library; ``text``: as it stands there, without the indentation of a class."""

    file: str
    text: str


def functions() -> Iterator[Function]:
    """Functions and methods of 4 to 40 lines, each text once."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if LEFT_OUT.intersection(file.parts):
            continue
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
        for node in ast.walk(ast.parse("".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if 4 <= text.count("\n") <= 40 and len(text) < 900 and text not in seen:
                    seen.add(text)
                    yield Function(str(file), text)


def gaps_of(function: Function, tokenizer: Tokenizer) -> Iterator[dict[str, str]]:
    """A name of one token in the body for each that stands again behind its first place, and what is on both sides."""
    lines = function.text.splitlines(keepends=True)
    begins = [0, *accumulate(map(len, lines))]
    for word in tokenize.generate_tokens(io.StringIO(function.text).readline):
        name, (line, column) = word.string, word.start
        if word.type != tokenize.NAME or keyword.iskeyword(name):
            continue
        begin, answer = begins[line - 1] + column - 1, f" {name}"  # tokens of words begin with the space before them
        before, behind = function.text[:begin], function.text[begin + len(answer) :]
        known, told = (re.search(rf"\b{re.escape(name)}\b", side) for side in (before, behind))
        is_one = function.text.startswith(answer, begin) and len(tokenizer.encode(answer)) == 1
        if line > 1 and is_one and told and not known:
            yield {"before": before, "answer": answer, "behind": behind, "file": function.file}


def write_data(every: int) -> list[str]:
    """Each eighth file is held out, by a hash of its name; each ``every``-th gap in these is asked for. Their files."""
    sides: dict[bool, list[Function]] = {False: [], True: []}
    for each in functions():
        sides[number_of(each.file) % 8 == 0].append(each)
    write_lines(Path("train.jsonl"), ({"text": each.text} for each in sides[False]))
    sentinels = [word for token in (PREFIX, SUFFIX, MIDDLE) for word in ("--special-token", token)]
    vocabulary = ["--vocab-size", "2048", "--pre-tokenizer", "qwen2", *sentinels]
    run("megatrain-data", "train-tokenizer", "train.jsonl", *vocabulary, "--out", "tokenizer.json")
    run("megatrain-data", "tokenize", "train.jsonl", "--tokenizer", "tokenizer.json", "--out", "train")
    tokenizer = Tokenizer.from_file("tokenizer.json")
    gaps = [gap for each in sides[True] for gap in gaps_of(each, tokenizer)][::every]
    write_lines(Path("held-out.jsonl"), gaps)
    tasks = [
        {"name": way, "kind": "generate", "path": "held-out.jsonl", "prompt": prompt, "answer": "{{ answer }}",
         "delimiter": "", "max_new_tokens": 1, "metrics": METRICS, "cluster": "{{ file }}"}
        for way, prompt in WAYS.items()
    ]  # fmt: skip
    Path("tasks.yaml").write_text(json.dumps(tasks))
    sys.stderr.write(f"{len(sides[False])} functions to train on, {len(gaps)} names in {len(sides[True])} others\n")
    return [gap["file"] for gap in gaps]


def exact_matches(model: str, way: str) -> Figure:
    """Of a model's answers."""
    answers = [json.loads(line) for line in Path(f"{model}-answers.jsonl").read_text().splitlines()]
    return mean(np.array([each["figures"]["exact_match"] for each in answers if each["task"] == way]))


def main(folder: Path, steps: int) -> None:
    began = time.time()
    enter(folder)
    files = write_data(1 if steps >= STEPS else 50)
    Path("fill.yaml").write_text(CONFIG)
    figures: dict[str, dict[str, Any]] = {}
    for name, fill in MODELS.items():
        length = [f"train.steps={steps}", f"schedule.warmup_steps={steps // 20}"]
        chosen = [f"run.dir={name}", f"data.train.0.fill_in_the_middle={fill}"]
        sys.stderr.write(run("megatrain", "train", "fill.yaml", "--procs", "2", *length, *chosen))
        asked = run("megatrain", "eval", name, "--tasks", "tasks.yaml", "--out", f"{name}-answers.jsonl", "--json")
        figures[name] = json.loads(asked)["tasks"]
    sys.stdout.write("| model | asked by | exact match | edit similarity |\n|---|---|---|---|\n")
    for model, tasks in figures.items():
        for way, metrics in tasks.items():
            sys.stdout.write(f"| {model} | {way} | {' | '.join(shown(metrics[name]) for name in METRICS)} |\n")
    both, left, plain = (
        exact_matches(*each)
        for each in (("filling", "both sides"), ("filling", "left to right"), ("plain", "both sides"))
    )
    gains = {"The text behind a gap": difference(both, left), "Fill-in-the-middle": difference(both, plain)}
    for (name, gain), error in zip(gains.items(), bootstrap([*gains.values()], files), strict=True):
        sys.stdout.write(f"{name} gains {gain.value:.4f} of exact matches ({error.low:.4f} to {error.high:.4f}).\n")
    sys.stdout.write(f"It took {time.time() - began:.0f} s.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)

"""What `make example-fill` runs: a small model learns to fill gaps in the functions of Python's standard library.

Two models are trained on the same functions with the same seed: one from left to right alone, one with most of its
functions rearranged for fill-in-the-middle. Each is asked for ends of lines of functions, from files that are held out.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import sys
import sysconfig
import textwrap
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.commands import enter, number_of, run, shown

STEPS, NUM_ASKED = 800, 600
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
CONFIG = """
model: {family: llama, hidden_size: 96, intermediate_size: 256, num_hidden_layers: 4, num_attention_heads: 2,
  num_key_value_heads: 2, max_position_embeddings: 512, tie_word_embeddings: true}
data: {train: [{path: train}], seq_len: 256, packing: best_fit, document_mask: true}
train: {global_batch_size: 16, micro_batch_size: 8, precision: fp32}
optimizer: {lr: 6.0e-3}
schedule: {type: cosine}
checkpoint: {every_steps: 10000}
observe: {log_every_steps: 50}
"""
WAYS = {"left to right": "{{ before }}", "both sides": PREFIX + SUFFIX + "{{ behind }}" + MIDDLE + "{{ before }}"}
METRICS = ("exact_match", "edit_similarity")
MODELS = {"plain": "null", "filling": "{rate: 0.8, spm_rate: 1.0}"}


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


def gap_of(text: str) -> dict[str, str] | None:
    """The rest of a line of the body from one of its names on, drawn by the text's hash, and what is on both sides."""
    lines = text.splitlines(keepends=True)
    names = [
        word.start
        for word in tokenize.generate_tokens(io.StringIO(text).readline)
        if word.type == tokenize.NAME and not keyword.iskeyword(word.string) and 1 < word.start[0] < len(lines)
    ]
    gaps = [(n - 1, at) for n, at in names if lines[n - 1][:at].strip() and 3 <= len(lines[n - 1]) - at <= 24]
    if not gaps:
        return None
    n, at = gaps[number_of(text) % len(gaps)]
    at = len(lines[n][:at].rstrip(" "))  # tokens of words begin with the space before them
    before, behind = "".join(lines[:n]) + lines[n][:at], "\n" + "".join(lines[n + 1 :])
    return {"before": before, "answer": lines[n][at:].rstrip("\n"), "behind": behind}


def write_data(num_asked: int) -> None:
    """Each tenth file is held out, by a hash of its name; what is a line of a training function is not asked for."""
    found = list(functions())
    held_out = [each for each in found if number_of(each.file) % 10 == 0]
    training = [each for each in found if number_of(each.file) % 10]
    known = {line.strip() for each in training for line in each.text.splitlines()}
    gaps = [gap for each in held_out if (gap := gap_of(each.text)) and gap["answer"].strip() not in known]
    for name, rows in (("train", [{"text": each.text} for each in training]), ("held-out", gaps[:num_asked])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [
        {"name": way, "kind": "generate", "path": "held-out.jsonl", "prompt": prompt, "answer": "{{ answer }}",
         "delimiter": "", "max_new_tokens": 16, "metrics": METRICS}
        for way, prompt in WAYS.items()
    ]  # fmt: skip
    Path("tasks.yaml").write_text(json.dumps(tasks))
    sys.stderr.write(f"{len(training)} functions to train on, {len(gaps)} gaps in held-out functions to ask for\n")


def main(folder: Path, steps: int) -> None:
    began = time.time()
    enter(folder)
    write_data(NUM_ASKED if steps >= STEPS else 8)
    sentinels = [word for token in (PREFIX, SUFFIX, MIDDLE) for word in ("--special-token", token)]
    vocabulary = ["--vocab-size", "1024", "--pre-tokenizer", "qwen2", *sentinels]
    run("megatrain-data", "train-tokenizer", "train.jsonl", *vocabulary, "--out", "tokenizer.json")
    run("megatrain-data", "tokenize", "train.jsonl", "--tokenizer", "tokenizer.json", "--out", "train")
    Path("fill.yaml").write_text(CONFIG)
    figures: dict[str, dict[str, Any]] = {}
    for name, fill in MODELS.items():
        length = [f"train.steps={steps}", f"schedule.warmup_steps={steps // 20}"]
        chosen = [f"run.dir={name}", f"data.train.0.fill_in_the_middle={fill}"]
        sys.stderr.write(run("megatrain", "train", "fill.yaml", "--procs", "2", *length, *chosen))
        figures[name] = json.loads(run("megatrain", "eval", name, "--tasks", "tasks.yaml", "--json"))["tasks"]
    sys.stdout.write("| model | asked by | exact match | edit similarity |\n|---|---|---|---|\n")
    for model, tasks in figures.items():
        for way, metrics in tasks.items():
            sys.stdout.write(f"| {model} | {way} | {' | '.join(shown(metrics[name]) for name in METRICS)} |\n")
    sys.stdout.write(f"It took {time.time() - began:.0f} s.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)

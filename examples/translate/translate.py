"""What `make example-translate` runs: French messages of programs into English, with few pairs and more text.

Three models are trained on the same pairs, in the same order: one from scratch, one that was pretrained to restore
words left out of text of both languages, and that one on pairs whose source lacks words. Each is scored on messages
that nothing in training is a near copy of.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatrain
from examples.commands import enter, run, write_lines
from examples.translate.catalogues import PACKAGES, Message, clusters, messages, near_copies
from megatrain.config.tasks import TextScore
from megatrain.tasks.bootstrap import bootstrap
from megatrain.tasks.text_scores import text_score

STEPS, STEPS_ON_TEXT = 240, 1500
NUM_TEST, NUM_VALIDATION, NUM_PAIRS = 500, 250, 4000
LARGEST = 8  # messages of a cluster that is translated: larger ones say the same again and again
DROPPED, COPIES = 0.15, 3  # the share of words that a source lacks; other words in each copy
SCORES: tuple[TextScore, ...] = ("bleu", "chrf")
BASELINES = {"pretrained": "scratch", "dropout": "pretrained"}  # what each is compared with
CONFIG = """
model: {family: t5, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, num_decoder_layers: 3,
  num_attention_heads: 4, head_dim: 32, max_position_embeddings: 128, tie_word_embeddings: false}
data: {train: [{path: DATA}], seq_len: 128}
train: {global_batch_size: 8, micro_batch_size: 4, precision: fp32}
parallel: {zero_stage: 0}
optimizer: {lr: 5.0e-2, scale_parameter: true}
schedule: {type: cosine}
checkpoint: {every_steps: 1000}
observe: {log_every_steps: 50}
objective: {type: sequence_to_sequence}
"""


def split(found: Sequence[Message], num_test: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each part, in whole clusters, drawn by the hash of their first message. Text is what is not held out."""
    members = defaultdict(list)
    for message, cluster in zip(found, clusters(found), strict=True):
        members[cluster].append({**message._asdict(), "cluster": str(cluster)})
    parts: dict[str, list[dict[str, Any]]] = {"test": [], "validation": [], "pairs": [], "text": []}
    for cluster in sorted(members, key=lambda cluster: hashlib.sha256(found[cluster].english.encode()).digest()):
        rows, size = members[cluster], len(members[cluster])
        if size <= LARGEST and len(parts["test"]) < num_test:
            parts["test"] += rows
        elif size <= LARGEST and len(parts["validation"]) < NUM_VALIDATION:
            parts["validation"] += rows
        else:
            parts["text"] += rows
            if size <= LARGEST and len(parts["pairs"]) < NUM_PAIRS:
                parts["pairs"] += rows
    return parts


def without_words(text: str, chance: random.Random) -> str:
    """What is left of a text after each of its words is left out by chance."""
    return " ".join(word for word in text.split(" ") if chance.random() >= DROPPED).strip() or text


def write_data(wheels: Path, packages: Sequence[str], num_test: int) -> None:
    """Datasets, with one tokenizer for both languages, and the task."""
    parts, chance = split(messages(packages, wheels), num_test), random.Random(1)
    held_out = [*parts["test"], *parts["validation"]]
    texts = list(dict.fromkeys(row[side] for side in ("french", "english") for row in parts["text"]))
    copies = near_copies(texts, [row[side] for row in held_out for side in ("french", "english")])
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in parts.items())
    sys.stdout.write(f"Messages: {sizes}. Held-out messages with a near copy in the text: {copies}.\n")
    write_lines(Path("text.jsonl"), [{"noisy": without_words(text, chance), "text": text} for text in texts * COPIES])
    parts["dropped"] = [{**row, "french": without_words(row["french"], chance)} for row in parts["pairs"] * COPIES]
    for name in ("pairs", "dropped", "validation", "test"):
        write_lines(Path(f"{name}.jsonl"), parts[name])
    options = ("--vocab-size", "2000", "--special-token", "<pad>")
    run("megatrain-data", "train-tokenizer", "text.jsonl", *options, "--out", "tokenizer.json")
    for name in ("text", "pairs", "dropped", "validation"):
        source, target = ("noisy", "text") if name == "text" else ("french", "english")
        keys = ("--source-key", source, "--target-key", target)
        run("megatrain-data", "tokenize", f"{name}.jsonl", "--tokenizer", "tokenizer.json", *keys, "--out", name)
    task = {
        "name": "english",
        "kind": "generate",
        "path": "test.jsonl",
        "prompt": "{{ french }}",
        "answer": "{{ english }}",
        "cluster": "{{ cluster }}",
        "metrics": SCORES,
        "max_new_tokens": 64,
        "stop": [],  # messages have several lines
    }
    Path("tasks.yaml").write_text(json.dumps([task]))


def train(name: str, data: str, steps: int, *chosen: str) -> None:
    Path(f"{name}.yaml").write_text(CONFIG.replace("DATA", data))
    length = (f"train.steps={steps}", f"schedule.warmup_steps={max(steps // 10, 1)}")
    sys.stderr.write(run("megatrain", "train", f"{name}.yaml", "--procs", "2", f"run.dir={name}", *length, *chosen))


def scored(name: str, baseline: str | None) -> dict[str, Any]:
    """What `megatrain eval` says of a model, and of how it differs from ``baseline``."""
    compared = () if baseline is None else ("--baseline", f"{baseline}-answers.jsonl")
    options = ("--tasks", "tasks.yaml", "--out", f"{name}-answers.jsonl", "--json")
    figures: dict[str, Any] = json.loads(run("megatrain", "eval", name, *options, *compared))
    return figures


def copied() -> dict[str, Any]:
    """The same of the source as its own translation."""
    rows = [json.loads(line) for line in Path("test.jsonl").read_text(encoding="utf-8").splitlines()]
    sources, references = ([row[side] for row in rows] for side in ("french", "english"))
    figures = {score: text_score(score, sources, references) for score in SCORES}
    sampled = bootstrap([*figures.values()], [row["cluster"] for row in rows])
    found = zip(figures.items(), sampled, strict=True)
    return {score: {"value": figure.value, "confidence_interval": each and each[1:]} for (score, figure), each in found}


def shown(metric: dict[str, Any]) -> str:
    low, high = metric["confidence_interval"]
    return f"{metric['value']:.2f} ({low:.2f} to {high:.2f})"


def show_curve(names: Sequence[str]) -> None:
    """Validation loss by step."""
    losses = [megatrain.open_run(name).validations.to_pydict() for name in names]
    sys.stdout.write(f"\n| step | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n")
    for step, *of_step in zip(losses[0]["step"], *(each["validation_loss"] for each in losses), strict=True):
        sys.stdout.write(f"| {step} | {' | '.join(f'{loss:.3f}' for loss in of_step)} |\n")


def show_scores(found: dict[str, dict[str, Any]]) -> None:
    """Those of each model, then how much those with a baseline gain over it."""
    sys.stdout.write("\n| model | BLEU | chrF |\n|---|---|---|\n")
    rows = {"copy of the source": copied(), **{name: each["tasks"]["english"] for name, each in found.items()}}
    rows |= {f"{name} - {BASELINES[name]}": found[name]["differences"]["english"] for name in BASELINES}
    for name, figures in rows.items():
        sys.stdout.write(f"| {name} | {' | '.join(shown(figures[score]) for score in SCORES)} |\n")
    for score in SCORES:
        sys.stdout.write(f"\n{score}: {rows['scratch'][score]['signature']}\n")


def main(folder: Path, steps: int) -> None:
    began = time.time()
    wheels, is_whole = folder.absolute().parent / "wheels", steps >= STEPS
    enter(folder)
    write_data(wheels, *(PACKAGES, NUM_TEST) if is_whole else (PACKAGES[:1], 8))
    train("pretraining", "text", STEPS_ON_TEXT if is_whole else steps)
    validated = ("data.validation=[{path: validation}]", f"train.eval_every_steps={max(steps // 8, 1)}")
    train("scratch", "pairs", steps, *validated)
    for name, data in (("pretrained", "pairs"), ("dropout", "dropped")):
        train(name, data, steps, *validated, "run.init_from=pretraining")
    found = {name: scored(name, BASELINES.get(name)) for name in ("scratch", *BASELINES)}
    show_scores(found)
    show_curve(tuple(found))
    sys.stdout.write(f"It took {time.time() - began:.0f} s.\n")
    low, _ = found["pretrained"]["differences"]["english"]["bleu"]["confidence_interval"]
    if is_whole and low <= 0:
        sys.exit("Pretraining gains no more than chance may give.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)

"""What `make example-classify` runs: which part of the Linux kernel's documentation is a passage from?

A small bert is pretrained by masked language modeling. It and the same model from scratch learn to classify passages
from 100, 1,000 and 10,000 labels. Beside them, logistic regression on bags of words.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification

from examples.classify.passages import Passage, largest_parts, passages, without_names
from examples.commands import enter, near_duplicates, number_of, run, unpack, write_lines
from megatrain.data import Dataset, open_dataset
from megatrain.tasks.bootstrap import Figure, bootstrap, difference, mean

PACKAGE = "linux-doc"  # depends on the documentation of Debian's kernel
NUM_PARTS = 12
MOST_OF_A_PART = {"train": 1200, "test": 150}  # passages
STEPS_OF_PRETRAINING = 5500
STEPS = {100: 150, 1_000: 300, 10_000: 600}  # by labels
SEQ_LEN = 128
CONFIG = """
model: {family: bert, hidden_size: 128, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4,
  max_position_embeddings: 128, initializer_range: 0.08}
data: {seq_len: 128, packing: best_fit, document_mask: true}
train: {global_batch_size: 16, micro_batch_size: 8, precision: fp32}
optimizer: {lr: 1.0e-3, betas: [0.9, 0.98], weight_decay: 0.01}
parallel: {zero_stage: 0}
checkpoint: {every_steps: 10000}
observe: {log_every_steps: 50, tensorboard: false}
"""
PRETRAINING = (
    "data.train=[{path: kernel, weight: 4}, {path: prose}]",
    "objective.masked_lm.mlm_probability=0.3",
    "objective.masked_lm.mask_replace_prob=1.0",
    "objective.masked_lm.random_replace_prob=0.0",
)
FINE_TUNING = ("model.hidden_dropout=0.1",)
MODELS: dict[str, tuple[str, ...]] = {"scratch": (), "pretrained": ("run.init_from=pretraining", "run.new_head=true")}


def documentation() -> Path:
    """That of the kernel."""
    depends = subprocess.run(["dpkg", "-f", unpack(PACKAGE), "Depends"], capture_output=True, text=True, check=True)
    package = depends.stdout.split()[0]
    sys.stdout.write(f"The documentation is {unpack(package).stem}.\n")
    return Path(package, "usr/share/doc", package, "Documentation")


def without_near_copies(found: Sequence[Passage]) -> list[Passage]:
    """One of the passages that are nearly alike stays."""
    named = ((str(number), passage.text) for number, passage in enumerate(found))
    dropped = {int(name) for name, _ in near_duplicates("alike", named)}
    return [passage for number, passage in enumerate(found) if number not in dropped]


def drawn(found: Iterable[Passage], most: int) -> list[Passage]:
    """In an order that is as good as random, at most so many of each part."""
    counts: Counter[str] = Counter()
    chosen = []
    for passage in sorted(found, key=lambda passage: number_of(passage.text)):
        counts[passage.part] += 1
        if counts[passage.part] <= most:
            chosen.append(passage)
    return chosen


def write_data() -> dict[str, list[Passage]]:
    """Datasets, with one tokenizer; the passages of each. Each fifth passage of these parts is held out."""
    found = passages(documentation())
    parts = largest_parts(found, NUM_PARTS)
    found = without_near_copies(without_names(found, parts))
    sides: dict[str, list[Passage]] = {"train": [], "test": []}
    for each in found:
        sides["test" if each.part in parts and number_of(each.text) % 5 == 0 else "train"].append(each)
    write_lines(Path("kernel.jsonl"), ({"text": each.text} for each in sides["train"]))
    run("megatrain-data", "corpus", "corpus")
    inputs = {"kernel": "kernel.jsonl", "prose": "corpus/prose.jsonl.zst"}
    special = [word for token in ("[CLS]", "[SEP]", "[MASK]") for word in ("--special-token", token)]
    run(
        "megatrain-data",
        "train-tokenizer",
        *inputs.values(),
        "--vocab-size",
        "2048",
        *special,
        "--out",
        "tokenizer.json",
    )
    for name, file in inputs.items():
        tokenize(name, file)
    asked = {
        name: drawn((each for each in side if each.part in parts), MOST_OF_A_PART[name]) for name, side in sides.items()
    }
    labeled = {"test": asked["test"]} | {f"{number}": asked["train"][:number] for number in STEPS}
    Path("parts.txt").write_text("".join(f"{part}\n" for part in parts))
    for name, side in labeled.items():
        write_lines(Path(f"{name}.jsonl"), ({"text": each.text, "part": each.part, "file": each.file} for each in side))
        tokenize(name, f"{name}.jsonl", "--label-key", "part", "--label-names", "parts.txt")
    sizes = ", ".join(f"{len(side)} in {name}" for name, side in labeled.items())
    sys.stdout.write(f"Passages: {sizes}; {len(sides['train'])} to pretrain on.\n")
    return labeled


def tokenize(name: str, file: str, *labels: str) -> None:
    ends = ("--bos-token", "[CLS]", "--eod-token", "[SEP]")
    run("megatrain-data", "tokenize", file, "--tokenizer", "tokenizer.json", *ends, *labels, "--out", name)


def train(name: str, steps: int, *chosen: str) -> None:
    length = (f"train.steps={steps}", f"schedule.warmup_steps={max(steps // 10, 1)}")
    sys.stderr.write(run("megatrain", "train", "bert.yaml", "--procs", "2", f"run.dir={name}", *length, *chosen))


def labels_of(side: Sequence[Passage]) -> NDArray[np.str_]:
    return np.array([passage.part for passage in side])


def linear_answers(known: Sequence[Passage], asked: Sequence[Passage]) -> NDArray[np.str_]:
    """Those of logistic regression on bags of words, weighted by TF-IDF."""
    words = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(words.fit_transform(passage.text for passage in known), labels_of(known))
    answers: NDArray[np.str_] = model.predict(words.transform(passage.text for passage in asked))
    return answers


def exported_answers(folder: str, asked: Dataset) -> NDArray[np.str_]:
    """Those that transformers gives by an exported folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = np.full((asked.num_documents, SEQ_LEN), asked.eod_id)
    lengths = np.zeros(len(ids), dtype=np.int64)
    for k, row in enumerate(ids):
        tokens = asked.document(k)[:SEQ_LEN]
        lengths[k], row[: len(tokens)] = len(tokens), tokens
        row[len(tokens) - 1] = asked.eod_id
    answers = []
    for part in np.array_split(np.argsort(lengths, kind="stable"), -(-len(ids) // 64)):
        width = lengths[part].max()
        mask = torch.from_numpy(np.arange(width) < lengths[part, None])
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids[part, :width]), attention_mask=mask.long()).logits
        answers += zip(part, (model.config.id2label[label] for label in logits.argmax(1).tolist()), strict=True)
    return np.array([label for _, label in sorted(answers)])


def fine_tuned_answers(name: str, data: str, steps: int, labels: NDArray[np.str_], *origin: str) -> NDArray[np.str_]:
    """Those of a model that is trained on ``data``, which are as often right in transformers as in megatrain."""
    train(name, steps, f"data.train=[{{path: '{data}'}}]", f"model.num_labels={NUM_PARTS}", *FINE_TUNING, *origin)
    run("megatrain", "export", name, "--out", f"{name}-hf")
    answers = exported_answers(f"{name}-hf", open_dataset("test"))
    accuracy = json.loads(run("megatrain", "eval", name, "--data", "test", "--json"))["accuracy"]
    if abs((answers == labels).mean() - accuracy) > 1e-3:
        sys.exit(f"{name}: transformers is right in {(answers == labels).mean()} and megatrain in {accuracy}.")
    return answers


def show(figures: dict[int, dict[str, Figure]], files: Sequence[str]) -> None:
    """Accuracies, and what pretraining gains, with intervals: texts of a file are drawn together."""
    sys.stdout.write("| labels | model | accuracy | 95% interval |\n|---|---|---|---|\n")
    for number, found in figures.items():
        every = {**found, "pretrained - scratch": difference(found["pretrained"], found["scratch"])}
        for (name, figure), error in zip(every.items(), bootstrap([*every.values()], files), strict=True):
            sys.stdout.write(f"| {number} | {name} | {figure.value:.4f} | {error.low:.4f} to {error.high:.4f} |\n")


def main(folder: Path, steps: int | None) -> None:
    began = time.time()
    enter(folder)
    labeled = write_data()
    Path("bert.yaml").write_text(CONFIG)
    train("pretraining", steps or STEPS_OF_PRETRAINING, *PRETRAINING)
    labels = labels_of(labeled["test"])
    figures: dict[int, dict[str, Figure]] = {}
    for number, steps_of_this in STEPS.items():
        figures[number] = {"bag of words": mean(linear_answers(labeled[f"{number}"], labeled["test"]) == labels)}
        for model, origin in MODELS.items():
            answers = fine_tuned_answers(f"{model}-{number}", f"{number}", steps or steps_of_this, labels, *origin)
            figures[number][model] = mean(answers == labels)
    show(figures, [passage.file for passage in labeled["test"]])
    sys.stdout.write(f"It took {time.time() - began:.0f} s.\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

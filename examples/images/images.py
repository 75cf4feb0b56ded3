"""What `make example-images` runs: a small vision transformer learns Fashion-MNIST, with and without augmentation.

Two models are trained on the same images with the same seed, in the same order, and classify the test set in
transformers, each from its exported folder alone. Beside them, a linear model of the pixels.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification

from examples.commands import enter, run, unpack
from megatrain.data.images import ImageDataset, open_images
from megatrain.tasks.bootstrap import bootstrap, difference, mean

PACKAGE, FILES = "dataset-fashion-mnist", Path("dataset-fashion-mnist/usr/share/datasets/fashion-mnist")
NAMES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
STEPS = 4000
LEAST_ACCURACY = 0.9
CONFIG = """
model: {family: vit, hidden_size: 128, num_hidden_layers: 3, num_attention_heads: 4, image_size: 28, patch_size: 14,
  num_channels: 1, initializer_range: 0.07, tie_word_embeddings: false}
data: {train: [train], seq_len: 5}
objective: {label_smoothing: 0.1, image_classification: {image_mean: [0.286], image_std: [0.353]}}
train: {global_batch_size: 256, micro_batch_size: 128, precision: fp32}
optimizer: {lr: 2.0e-3, betas: [0.9, 0.99], weight_decay: 0.05}
schedule: {type: cosine, min_lr_ratio: 0.0}
parallel: {zero_stage: 0}
observe: {log_every_steps: 100, tensorboard: false}
"""
MODELS = {"plain": (), "augmented": ("flip_prob=0.5", "mixup_alpha=0.2")}


def pixels_of(images: ImageDataset) -> NDArray[np.uint8]:
    """All of them, [images, height, width]."""
    return np.stack([images.image(k)[:, :, 0] for k in range(images.num_images)])


def labels_of(images: ImageDataset) -> NDArray[np.int64]:
    return np.array([images.label(k) for k in range(images.num_images)])


def linear_answers(train: ImageDataset, test: ImageDataset) -> NDArray[np.int64]:
    """Those of multinomial logistic regression: the likeliest weights under a penalty of their squares."""
    x, held_out = (torch.from_numpy(pixels_of(each)).flatten(1) / 255.0 for each in (train, test))
    labels, model = torch.from_numpy(labels_of(train)), nn.Linear(x.shape[1], len(train.label_names))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(model(x), labels) + 1e-4 * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.inference_mode():
        return model(held_out).argmax(1).numpy()


def exported_answers(folder: str, test: ImageDataset) -> NDArray[np.int64]:
    """Those that transformers gives by an exported folder alone."""
    processor, model = (each.from_pretrained(folder) for each in (AutoImageProcessor, AutoModelForImageClassification))
    answers = []
    for part in np.array_split(pixels_of(test), -(-test.num_images // 500)):
        inputs = processor(list(part[:, None]), input_data_format="channels_first", return_tensors="pt")
        with torch.inference_mode():
            answers.append(model.eval()(**inputs).logits.argmax(1).numpy())
    return np.concatenate(answers)


def main(folder: Path, steps: int) -> None:
    began = time.time()
    enter(folder)
    unpack(PACKAGE)
    Path("names.txt").write_text("\n".join(NAMES.split()) + "\n")
    for name, files in (("train", "train"), ("test", "t10k")):
        path = str(FILES / f"{files}-images-idx3-ubyte.gz")
        run("megatrain-data", "images", path, "--label-names", "names.txt", "--out", name)
    train, test = open_images("train"), open_images("test")
    labels = labels_of(test)
    figures = {"linear": mean(linear_answers(train, test) == labels)}
    Path("vit.yaml").write_text(CONFIG)
    for name, augmentation in MODELS.items():
        length = [f"train.steps={steps}", f"checkpoint.every_steps={steps}", f"schedule.warmup_steps={steps // 10}"]
        chosen = [f"run.dir={name}", *(f"objective.image_classification.{each}" for each in augmentation)]
        sys.stderr.write(run("megatrain", "train", "vit.yaml", "--procs", "2", *length, *chosen))
        accuracy = json.loads(run("megatrain", "eval", name, "--data", "test", "--json"))["accuracy"]
        run("megatrain", "export", name, "--out", f"{name}-hf")
        figures[name] = mean(exported_answers(f"{name}-hf", test) == labels)
        if abs(figures[name].value - accuracy) > 1e-3:
            sys.exit(f"{name}: transformers has an accuracy of {figures[name].value} and megatrain one of {accuracy}.")
    gain = difference(figures["augmented"], figures["plain"])
    *sampled, of_gain = bootstrap([*figures.values(), gain])
    sys.stdout.write("| model | top-1 accuracy | 95% interval |\n|---|---|---|\n")
    for (name, figure), error in zip(figures.items(), sampled, strict=True):
        sys.stdout.write(f"| {name} | {figure.value:.4f} | {error.low:.4f} to {error.high:.4f} |\n")
    sys.stdout.write(
        f"Augmentation gains {gain.value:.4f} (paired, 95% interval {of_gain.low:.4f} to {of_gain.high:.4f}); "
        f"it took {time.time() - began:.0f} s.\n"
    )
    if steps >= STEPS and (figures["augmented"].value < LEAST_ACCURACY or of_gain.low <= 0.0):
        sys.exit(f"The accuracy is to be at least {LEAST_ACCURACY}, and the gain above 0.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else STEPS)

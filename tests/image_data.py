"""A dataset of small labeled images, made by the real data tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.images import ImageOptions, pack_images
from data_tools.job import Effort
from tests.image_samples import NAMES, Pixels, write_folder
from tests.runs import TinyData, tiny_config
from tests.tiny_data import silent

AUGMENTED = {
    "min_crop_scale": 0.5,
    "flip_prob": 0.3,
    "randaugment": {"num_ops": 1, "magnitude": 3.0},
    "mixup_alpha": 0.3,
}


def make_image_data(folder: Path) -> TinyData:
    """Images in color whose label is their orientation of stripes, of several sizes, in several shards."""
    for name, seed, count in (("prose", 0, 40), ("code", 1, 30), ("held-out", 2, 19)):
        random = np.random.default_rng(seed)
        write_folder(folder / "in" / name, [_striped(random, k % len(NAMES)) for k in range(count)])
        options = ImageOptions(shard_bytes=9000)
        assert pack_images([str(folder / "in" / name)], folder / name, options, Effort(1, silent)) is not None
    return TinyData(folder / "prose", folder / "code", folder / "held-out", folder)


def _striped(random: np.random.Generator, label: int) -> tuple[Pixels, int]:
    height, width = random.integers(12, 20, 2).tolist()
    rows, columns = np.mgrid[0:height, 0:width]
    stripes = (rows, columns, rows + columns)[label] // 2 % 2 * 150
    noise = random.integers(0, 100, (height, width, 3))
    return (stripes[:, :, None] + noise).astype(np.uint8), label


def image_config(data: TinyData, run_dir: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a tiny classifier, with all augmentations; ``sections`` are laid over its own."""
    config = tiny_config(data, run_dir)
    config["data"] |= {"seq_len": 10}
    config["model"] = {
        "family": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "tie_word_embeddings": False,
    }
    config["objective"] = {"image_classification": AUGMENTED}
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return config

"""Classification of images: the label of each is predicted at the class token.

An image becomes pixels, the model's size and channels, normalised. In training it is augmented, by the seed and its
place in the run alone: the image that it is mixed with, too, so that no batch decides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatrain.config import ImageClassificationConfig, ModelConfig
from megatrain.data.augmentation import Augmentation
from megatrain.data.image_transforms import (
    mixup_share,
    normalize,
    rand_augment,
    random_crop,
    random_flip,
    resize,
    with_channels,
)
from megatrain.data.images import ImageDataset, Pixels
from megatrain.data.order import Samples
from megatrain.data.packing import PackingPlan
from megatrain.data.sample import Sample, Source
from megatrain.data.transforms import generator_of


class ImageClassification:
    """The objective of a classifier of images."""

    def __init__(self, config: ImageClassificationConfig, model: ModelConfig, seed: int) -> None:
        self._config, self._model, self._seed = config, model, seed

    def refuse_unsuited(self, dataset: ImageDataset) -> None:
        """Each has images and labels."""

    def num_samples(self, dataset: ImageDataset) -> int:
        return dataset.num_documents

    def store_plans(self, datasets: Sequence[ImageDataset], folder: Path) -> None:
        """Each sample is an image."""

    def training_source(self, dataset: ImageDataset, folder: Path, augmentation: Augmentation | None) -> Source:
        return LabeledImages(dataset, self._config, _shape(self._model), self._seed)

    def evaluation_source(self, dataset: ImageDataset) -> Source:
        return LabeledImages(dataset, self._config, _shape(self._model), None)


@dataclass(frozen=True)
class ImageShape:
    """What a model reads: squares of ``size`` pixels, as ``num_places`` tokens."""

    size: int
    num_channels: int
    num_places: int


def _shape(model: ModelConfig) -> ImageShape:
    assert model.num_places is not None
    return ImageShape(getattr(model, "image_size"), model.sizes["channels"], model.num_places)  # noqa: B009


@dataclass(frozen=True)
class LabeledImages:
    """The images of a dataset and their labels. ``seed``: of what is done to them in training; None: nothing is."""

    dataset: ImageDataset
    config: ImageClassificationConfig
    shape: ImageShape
    seed: int | None
    plan: PackingPlan | None = field(default=None, init=False)
    left_out: str | None = field(default=None, init=False)

    @property
    def seq_len(self) -> int:
        return self.shape.num_places

    @property
    def num_samples(self) -> int:
        return self.dataset.num_images

    @property
    def mixes(self) -> bool:
        """Whether a sample has two labels, each of which counts for a share."""
        return self.seed is not None and self.config.mixup_alpha > 0.0

    @property
    def all_scored(self) -> bool:
        return not self.mixes

    def num_targets(self, samples: Samples) -> int:
        """One for each image: the shares of two labels add up to 1."""
        return len(samples)

    def num_bytes(self) -> int:
        """None: there is no text."""
        return 0

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        pixels, labels, shares = self._pixels(index, "image", number), [self.dataset.label(index)], None
        if self.mixes:
            random = self._random("mixup", number)
            share, partner = mixup_share(self.config.mixup_alpha, random), int(random.integers(self.num_samples))
            pixels = np.float32(share) * pixels + np.float32(1.0 - share) * self._pixels(partner, "partner", number)
            labels.append(self.dataset.label(partner))
            shares = np.array([share, 1.0 - share], dtype=np.float32)
        places = np.arange(self.seq_len)
        return Sample(
            tokens_T=places,
            targets_M=np.array(labels, dtype=np.int64),
            loss_mask_M=shares,
            positions_T=places,
            document_ids_T=None,
            target_places_M=np.zeros(len(labels), dtype=np.int64),
            pixels_CHW=pixels,
        )

    def _pixels(self, index: int, name: str, number: int) -> npt.NDArray[np.float32]:
        """Of an image as the model reads it; in training as it is seen at place ``number`` of the run."""
        pixels = with_channels(self.dataset.image(index), self.shape.num_channels)
        pixels = resize(pixels, self.shape.size) if self.seed is None else self._augmented(pixels, name, number)
        mean, std = (np.array(each, np.float32) for each in (self.config.image_mean, self.config.image_std))
        return normalize(pixels, mean, std)

    def _augmented(self, pixels: Pixels, name: str, number: int) -> Pixels:
        config, random = self.config, self._random(name, number)
        pixels = random_crop(pixels, config.min_crop_scale, self.shape.size, random)
        pixels = random_flip(pixels, config.flip_prob, random)
        if config.randaugment is not None:
            pixels = rand_augment(pixels, config.randaugment.num_ops, config.randaugment.magnitude, random)
        return pixels

    def _random(self, name: str, number: int) -> np.random.Generator:
        assert self.seed is not None
        return generator_of(f"image_classification/{name}/{number}", self.seed)

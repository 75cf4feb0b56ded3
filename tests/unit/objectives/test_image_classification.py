"""Samples of images: the same for any batch and layout, by the seed and the place in the run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from megatrain.config import ImageClassificationConfig, ModelConfig, ObjectiveConfig
from megatrain.config.schema import RandAugmentConfig
from megatrain.data.batches import BatchMaker, EvaluationBatches
from megatrain.data.images import ImageDataset, open_images
from megatrain.data.order import Samples
from megatrain.data.sample import Source
from megatrain.model.decoder import Decoder
from megatrain.model.init import init_model
from megatrain.objectives import make_objective
from tests.runs import TinyData

MODEL = ModelConfig(
    family="vit",
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    vocab_size=3,
    tie_word_embeddings=False,
)
AUGMENTED = ImageClassificationConfig(
    min_crop_scale=0.5, flip_prob=0.5, randaugment=RandAugmentConfig(num_ops=2, magnitude=4.0), mixup_alpha=0.4
)


@pytest.fixture(scope="module")
def dataset(image_data: TinyData) -> ImageDataset:
    return open_images(image_data.prose)


def source(dataset: ImageDataset, seed: int = 5, **keys: Any) -> Source:
    config = ObjectiveConfig(image_classification=AUGMENTED.model_copy(update=keys))
    data: Any = None  # text alone has settings of how it is cut
    return make_objective(config, MODEL, data, seed).training_source(dataset, Path(), None)


def samples(numbers: range) -> Samples:
    number = np.array(numbers)
    return Samples(np.zeros_like(number), np.zeros_like(number), number * 7 % 40, number)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_batch_decides_how_an_image_is_seen(size: int, dataset: ImageDataset) -> None:
    whole = BatchMaker([source(dataset)], 13).make(samples(range(13)))[0]
    parts = BatchMaker([source(dataset)], size).make(samples(range(13)))
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets_BM for part in parts]), whole.targets_BM)
    shares = [part.loss_mask_BM for part in parts if part.loss_mask_BM is not None]
    assert whole.loss_mask_BM is not None
    assert torch.equal(torch.cat(shares), whole.loss_mask_BM)
    assert torch.allclose(whole.loss_mask_BM.sum(1), torch.ones(13))


def test_another_place_or_seed_is_seen_otherwise(dataset: ImageDataset) -> None:
    first = source(dataset).sample(3, 0, 11)
    again, later, other = source(dataset).sample(3, 0, 11), source(dataset).sample(3, 0, 12), source(dataset, 6)
    assert first.pixels_CHW is not None
    assert np.array_equal(first.pixels_CHW, again.pixels_CHW)
    assert not np.array_equal(first.pixels_CHW, later.pixels_CHW)
    assert not np.array_equal(first.pixels_CHW, other.sample(3, 0, 11).pixels_CHW)


def test_evaluation_sees_images_as_they_are(dataset: ImageDataset) -> None:
    data: Any = None
    config = ObjectiveConfig(image_classification=AUGMENTED)
    one, other = (make_objective(config, MODEL, data, seed).evaluation_source(dataset) for seed in (1, 2))
    seen = [each.sample(4, 0, number) for each, number in ((one, 0), (other, 9))]
    assert seen[0].pixels_CHW is not None
    assert np.array_equal(seen[0].pixels_CHW, seen[1].pixels_CHW)
    assert seen[0].targets_M.tolist() == [dataset.label(4)]


def test_mixed_labels_count_by_their_shares(dataset: ImageDataset) -> None:
    model = Decoder(MODEL)
    init_model(model, MODEL.model_copy(update={"initializer_range": 0.3}), 0)
    (batch,) = BatchMaker([source(dataset)], 7).make(samples(range(7)))
    assert batch.loss_mask_BM is not None
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    gradient = model.get_parameter("classifier.weight").grad
    model.zero_grad()
    logits_BMV = model.head(model._at_targets(model.hidden(batch.inputs, model.context(batch)), batch))
    soft_BV = (functional.one_hot(batch.targets_BM, 3) * batch.loss_mask_BM.unsqueeze(-1)).sum(1)
    expected = functional.cross_entropy(logits_BMV[:, 0], soft_BV, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.get_parameter("classifier.weight").grad)


def test_means_of_pixels_to_255_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"image_mean: .*127.5.* given; every number must be in \[0, 1\]"):
        ImageClassificationConfig(image_mean=(127.5,))


def test_each_image_is_evaluated_once(image_data: TinyData) -> None:
    held_out = open_images(image_data.held_out)
    data: Any = None
    images = make_objective(ObjectiveConfig(), MODEL, data, 0).evaluation_source(held_out)
    counted = 0
    for rank in range(3):
        batches = EvaluationBatches(BatchMaker([images], 4), rank, 3)
        assert batches.num_targets == 19
        counted += sum(4 if b.loss_mask_BM is None else int(b.loss_mask_BM.sum()) for b in batches)
    assert counted == 19

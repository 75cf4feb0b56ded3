"""How images become pixels, as transformers' image processors say it, and as our configs do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from megatrain.checkpoint.image_processor import differences, from_transformers, to_transformers
from megatrain.config import ImageClassificationConfig, ModelConfig
from megatrain.data.image_transforms import normalize
from megatrain.errors import CheckpointError

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 12}
MODEL = ModelConfig(family="vit", patch_size=4, num_channels=3, tie_word_embeddings=False, **SIZES)
GRAY = MODEL.model_copy(update={"num_channels": 1})


@pytest.mark.parametrize(
    "theirs",
    [
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]},
        {"image_mean": 0.25, "image_std": [0.5, 0.5, 0.5]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 510, "image_mean": [0.1, 0.1, 0.2]},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [50.0, 60.0, 70.0]},
    ],
    ids=["own", "one", "none", "half", "not rescaled"],
)
def test_pixels_become_the_numbers_of_transformers(theirs: dict[str, Any]) -> None:
    seen, notes = from_transformers(theirs, MODEL)
    assert notes == []
    mean, std = (np.array(each, np.float32) for each in (seen.image_mean, seen.image_std))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    processor = ViTImageProcessorPil(**theirs, size={"height": 12, "width": 12})
    expected = np.asarray(processor(pixels, return_tensors="np")["pixel_values"][0])
    np.testing.assert_allclose(normalize(pixels, mean, std), expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_read_again() -> None:
    for model, mean in ((MODEL, (0.1, 0.2, 0.3)), (MODEL, (0.3,)), (GRAY, (0.3,))):
        seen = ImageClassificationConfig(image_mean=mean, image_std=(0.4,))
        assert from_transformers(to_transformers(seen, model), model) == (seen, [])
        assert not differences(seen, seen)
    assert differences(ImageClassificationConfig(image_mean=(0.5, 0.5, 0.5)), ImageClassificationConfig()) == []


def test_what_is_done_otherwise_is_told() -> None:
    theirs = {"resample": 3, "do_center_crop": True, "size": {"shortest_edge": 14}}
    (note,) = from_transformers(theirs, MODEL)[1]
    assert "resample 3, a center crop, size {'shortest_edge': 14}: images are resized bilinear to 12 x 12 here" in note


@pytest.mark.parametrize(
    "wrong", [{"image_std": [0.0]}, {"image_mean": "x"}, {"rescale_factor": 0.0}, {"image_mean": [1.0, 0.5]}]
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: image_mean"):
        from_transformers(wrong, MODEL)

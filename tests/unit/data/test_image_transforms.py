"""What is done to images in training: each is a function of the image and the generator, and has its limits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from transformers import ViTImageProcessorPil

from megatrain.data.image_transforms import (
    OPERATIONS,
    augment,
    normalize,
    rand_augment,
    random_crop,
    random_flip,
    resize,
    with_channels,
)
from megatrain.data.images import Pixels
from tests.image_samples import make_images


def smooth_image(channels: int) -> Pixels:
    """Of 64 x 48 pixels, without noise, so that what moves changes it the more the further it moves."""
    noise = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
    blurred = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(9))
    pixels = np.array(blurred).astype(np.float32)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    return with_channels(pixels.astype(np.uint8), channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_strength_is_monotonic_and_zero_changes_nothing(operation: str, channels: int) -> None:
    pixels = smooth_image(channels)
    assert np.array_equal(augment(pixels, operation, 0.0), pixels)
    for sign in (1, -1):
        changes = [
            float(np.abs(augment(pixels, operation, sign * strength).astype(float) - pixels).mean())
            for strength in (0.001, 0.25, 0.5, 0.75, 1.0)
        ]
        assert changes == sorted(changes)
        assert changes[0] < 2.0
        assert changes[-1] > changes[0] or (operation, channels) == ("color", 1)  # gray has no color


def test_rand_augment_of_no_magnitude_changes_nothing() -> None:
    pixels = smooth_image(3)
    assert np.array_equal(rand_augment(pixels, 5, 0.0, np.random.default_rng(0)), pixels)
    one, again = (rand_augment(pixels, 2, 5.0, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, pixels)


def test_whole_crop_is_the_resized_image() -> None:
    pixels = smooth_image(3)
    assert np.array_equal(random_crop(pixels, 1.0, 32, np.random.default_rng(0)), resize(pixels, 32))
    crops = [random_crop(pixels, 0.3, 32, np.random.default_rng(seed)) for seed in range(20)]
    assert {crop.shape for crop in crops} == {(32, 32, 3)}
    assert len({crop.tobytes() for crop in crops}) == 20


def test_flips_mirror_their_share_of_images() -> None:
    pixels, random = smooth_image(1), np.random.default_rng(0)
    flipped = [np.array_equal(random_flip(pixels, 0.3, random), pixels[:, ::-1]) for _ in range(1000)]
    assert abs(sum(flipped) - 300) < 3 * np.sqrt(1000 * 0.3 * 0.7)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_transformers_processor(channels: int) -> None:
    mean, std = [0.3, 0.5, 0.6][:channels], [0.2, 0.3, 0.25][:channels]
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=mean, image_std=std)
    for pixels, _ in make_images(6, channels):
        ours = normalize(resize(pixels, 12), np.array(mean, np.float32), np.array(std, np.float32))
        (theirs,) = processor([pixels], return_tensors="np", input_data_format="channels_last").pixel_values
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gray_and_color_become_each_other() -> None:
    color = smooth_image(3)
    gray = with_channels(color, 1)
    assert np.abs(gray[:, :, 0].astype(int) - np.array(Image.fromarray(color).convert("L"))).max() <= 1
    assert np.array_equal(with_channels(gray, 3)[:, :, 1], gray[:, :, 0])

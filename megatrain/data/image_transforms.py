"""What is done to images in training: crops, flips, RandAugment, mixup. Pure functions of an image and a generator.

Pixels are uint8 [H, W, C], C = 1 or 3. H: height, W: width, C: channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from megatrain.data.images import Pixels

MAX_MAGNITUDE = 10.0
MAX_DEGREES = 30.0
MAX_SHEAR = 0.3
MAX_SHIFT = 0.3
"""Of the image's width or height."""
MAX_FACTOR = 0.9
"""By which brightness, contrast, color or sharpness are raised or lowered."""
ASPECT_RATIOS = 3 / 4, 4 / 3
CROP_TRIES = 10
LUMINANCE = 0.299, 0.587, 0.114
"""ITU-R BT.601, as Pillow has it."""


def with_channels(pixels: Pixels, num_channels: int) -> Pixels:
    """Gray in three channels, or the luminance of color in one."""
    if pixels.shape[2] == num_channels:
        return pixels
    if num_channels == 3:
        return np.repeat(pixels, 3, axis=2)
    gray: Pixels = np.rint(pixels @ np.array(LUMINANCE))[:, :, None].astype(np.uint8)
    return gray


def resize(pixels: Pixels, size: int) -> Pixels:
    """To a square of ``size`` pixels, bilinear: what transformers' ViTImageProcessor does."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return _pixels(_image(pixels).resize((size, size), Image.Resampling.BILINEAR))


def random_crop(pixels: Pixels, min_scale: float, size: int, random: np.random.Generator) -> Pixels:
    """A part of the image, of at least ``min_scale`` of its area, resized to ``size`` (Szegedy et al. 2014).

    Its ratio of width to height is between 3/4 and 4/3 of the image's own. With a scale of 1 it is the whole image.
    """
    height, width = pixels.shape[:2]
    for _ in range(CROP_TRIES if min_scale < 1.0 else 0):
        share = random.uniform(min_scale, 1.0)
        ratio = math.exp(random.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        w, h = round(width * math.sqrt(share * ratio)), round(height * math.sqrt(share / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            return resize(pixels[top : top + h, left : left + w], size)
    return resize(pixels, size)


def random_flip(pixels: Pixels, probability: float, random: np.random.Generator) -> Pixels:
    """Mirrored, left to right, or as it is."""
    return np.ascontiguousarray(pixels[:, ::-1]) if random.random() < probability else pixels


def rand_augment(pixels: Pixels, num_ops: int, magnitude: float, random: np.random.Generator) -> Pixels:
    """``num_ops`` of OPERATIONS, chosen at random, one after the other (Cubuk et al. 2019, arXiv:1909.13719).

    ``magnitude``: 0, where nothing is changed, to MAX_MAGNITUDE. Operations without a strength are left out.
    """
    names = list(OPERATIONS)
    for number in random.integers(len(names), size=num_ops).tolist():
        sign = 1.0 if random.random() < 0.5 else -1.0
        pixels = augment(pixels, names[number], sign * magnitude / MAX_MAGNITUDE)
    return pixels


def augment(pixels: Pixels, operation: str, strength: float) -> Pixels:
    """One of OPERATIONS by ``strength`` in [-1, 1]; 0 changes nothing."""
    return pixels if strength == 0.0 else _pixels(OPERATIONS[operation](_image(pixels), strength))


def normalize(pixels: Pixels, mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """fp32 [C, H, W]: (pixels / 255 - mean) / std; mean and std have one number, or one a channel."""
    scaled = pixels.astype(np.float32) / np.float32(255.0)
    normal: npt.NDArray[np.float32] = np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))
    return normal


def mixup_share(alpha: float, random: np.random.Generator) -> float:
    """The share of an image in its mixture with another one (Zhang et al. 2017, arXiv:1710.09412)."""
    return float(random.beta(alpha, alpha))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """About the middle of the image, in Pillow's coordinates, which count from a corner. Outside of it is black."""
    a, b, c, d, e, f = matrix
    x, y = image.width / 2, image.height / 2
    about = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return image.transform(image.size, Image.Transform.AFFINE, about, Image.Resampling.BILINEAR)


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    angle = math.radians(MAX_DEGREES * strength)
    cos, sin = math.cos(angle), math.sin(angle)
    return _affine(image, (cos, sin, 0.0, -sin, cos, 0.0))


def _enhanced(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: enhancer(image).enhance(1.0 + MAX_FACTOR * strength)


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _solarize(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - round(256 * abs(strength)))


OPERATIONS: Mapping[str, Callable[[Image.Image, float], Image.Image]] = {
    "rotate": _rotate,
    "shear_x": lambda image, strength: _affine(image, (1.0, MAX_SHEAR * strength, 0.0, 0.0, 1.0, 0.0)),
    "shear_y": lambda image, strength: _affine(image, (1.0, 0.0, 0.0, MAX_SHEAR * strength, 1.0, 0.0)),
    "translate_x": lambda image, strength: _affine(
        image, (1.0, 0.0, MAX_SHIFT * image.width * strength, 0.0, 1.0, 0.0)
    ),
    "translate_y": lambda image, strength: _affine(
        image, (1.0, 0.0, 0.0, 0.0, 1.0, MAX_SHIFT * image.height * strength)
    ),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "posterize": _posterize,
    "solarize": _solarize,
}
"""Each changes nothing at strength 0, and more the further the strength is from it."""


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image) -> Pixels:
    pixels = np.array(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels

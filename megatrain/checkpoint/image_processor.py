"""preprocessor_config.json of Hugging Face's transformers, and ours: how images become what a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatrain.config import ImageClassificationConfig, ModelConfig
from megatrain.errors import CheckpointError

PREPROCESSOR = "preprocessor_config.json"
RESCALED = 1 / 255
BILINEAR = 2
"""Pillow's number of it."""


def to_transformers(seen: ImageClassificationConfig, model: ModelConfig) -> dict[str, Any]:
    """How their ViTImageProcessor makes of images what a run reads."""
    num_channels, side = model.sizes["channels"], _side(model)
    mean, std = (list(each) * (num_channels if len(each) == 1 else 1) for each in (seen.image_mean, seen.image_std))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": num_channels == 3,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": RESCALED,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def from_transformers(theirs: Mapping[str, Any], model: ModelConfig) -> tuple[ImageClassificationConfig, list[str]]:
    """How images are read, and what is done otherwise here. Raises CheckpointError where it has no meaning here."""
    theirs = {key: value for key, value in theirs.items() if value is not None}
    factor = theirs.get("rescale_factor", RESCALED) if theirs.get("do_rescale", True) else 1.0
    given = {"image_mean": theirs.get("image_mean", 0.5), "image_std": theirs.get("image_std", 0.5)}
    if not theirs.get("do_normalize", True):
        given = {"image_mean": 0.0, "image_std": 1.0}
    try:
        scale = 1.0 if factor == RESCALED else 255.0 * factor
        numbers = {
            key: [each / scale for each in (value if isinstance(value, list) else [value])]
            for key, value in given.items()
        }
        numbers = {key: value[:1] if len(set(value)) == 1 else value for key, value in numbers.items()}
        seen = ImageClassificationConfig.model_validate(numbers)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{PREPROCESSOR}: image_mean, image_std or rescale_factor: {why}.") from None
    if any(len(value) not in (1, model.sizes["channels"]) for value in numbers.values()):
        raise CheckpointError(
            f"{PREPROCESSOR}: image_mean and image_std have other numbers than one for each of the model's "
            f"{model.sizes['channels']} channels."
        )
    side = _side(model)
    others = [
        f"resample {theirs['resample']}" if theirs.get("resample", BILINEAR) != BILINEAR else "",
        "a center crop" if theirs.get("do_center_crop") else "",
        f"size {theirs['size']}" if theirs.get("size", side) not in (side, {"height": side, "width": side}) else "",
    ]
    asked = ", ".join(filter(None, others))
    note = f"{PREPROCESSOR} asks for {asked}: images are resized bilinear to {side} x {side} here."
    return seen, [note] if asked else []


def differences(theirs: ImageClassificationConfig, ours: ImageClassificationConfig) -> list[str]:
    """The keys by which pixels become other numbers in ``ours``, each with both values."""
    pairs = ((key, list(getattr(theirs, key)), list(getattr(ours, key))) for key in ("image_mean", "image_std"))
    return [
        f"{key} is {there} there and {here} here"
        for key, there, here in pairs
        if there * (len(here) if len(there) == 1 else 1) != here * (len(there) if len(here) == 1 else 1)
    ]


def _side(model: ModelConfig) -> int:
    return int(getattr(model, "image_size"))  # noqa: B009 (a family's own key)

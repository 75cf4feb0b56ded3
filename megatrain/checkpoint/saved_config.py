"""What a checkpoint says of the model in it, checked before anything is made of it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, PositiveInt, ValidationError

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import MANIFEST, Manifest
from megatrain.config import LoraConfig, ModelConfig, ObjectiveConfig
from megatrain.errors import CheckpointError
from megatrain.plan.flops import num_trained_parameters

_LEAST_BYTES = 2  # of a stored element


class _Data(BaseModel):
    seq_len: PositiveInt
    document_mask: bool
    packing: str = "concat"
    score_after_eod: bool | None = None

    @property
    def scores_after_eod(self) -> bool:
        return self.packing == "concat" if self.score_after_eod is None else self.score_after_eod


class _Train(BaseModel):
    precision: Literal["bf16", "fp16", "fp32"]


class SavedConfig(BaseModel):
    """The part of a manifest's ``config`` that is needed to use the model without training it."""

    model: ModelConfig
    data: _Data
    train: _Train
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = None


def saved_config(manifest: Manifest, folder: Location) -> SavedConfig:
    """That of the checkpoint in ``folder``. Raises CheckpointError where this version cannot read it, or where the
    model would be larger than the files: nothing is allocated on the word of a damaged one."""
    path = folder / MANIFEST
    try:
        config = SavedConfig.model_validate(manifest.config)
        needed = num_trained_parameters(config.model, config.lora) * _LEAST_BYTES
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["config", *map(str, first["loc"])])
        raise CheckpointError(
            f"{path}: {key}: {first['msg']}. Use the version of megatrain that wrote it ("
            f"{manifest.versions.get('megatrain', 'unknown')})."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from None
    if needed > sum(entry.bytes for entry in manifest.files):
        raise CheckpointError(
            f"{path}: its files are too small for the {needed // _LEAST_BYTES:,} parameters of its model."
        )
    return config

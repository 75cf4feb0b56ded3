"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from megatrain import __version__
from megatrain.checkpoint import huggingface
from megatrain.checkpoint.location import Location, sync_folder, write_file
from megatrain.checkpoint.manifest import MANIFEST, Manifest
from megatrain.checkpoint.pieces import write_pieces
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import saved_config
from megatrain.checkpoint.store import add_file, resolve
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import Fragment, Placement, windows
from megatrain.errors import CheckpointError, ConfigError
from megatrain.model.decoder import Decoder
from megatrain.plan.flops import num_parameters

_EVALUATION_TOKENS = 1024


def export_checkpoint(path: Location, out: Path, shard_bytes: int = huggingface.SHARD_BYTES) -> Location:
    """Write a checkpoint (or the newest good one of a run) as a Hugging Face folder; the checkpoint's folder."""
    folder = resolve(path)
    reader = CheckpointReader(folder)
    saved = saved_config(reader.manifest, folder)
    huggingface.export_folder(reader, saved, parameter_shapes(saved.model), out, shard_bytes)
    return folder


def import_folder(folder: Path, out: Path) -> Manifest:
    """Make a checkpoint of a Hugging Face folder, for ``run.init_from``, eval and generate; it appears when whole.

    Raises CheckpointError where the folder is no model, or not one that can be imported.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: give --out a folder that does not, or remove that one.")
    config = huggingface.read_config(folder)
    huggingface.refuse_too_small(folder, num_parameters(config))
    weights = huggingface.HuggingFaceWeights(folder, parameter_shapes(config))
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        manifest = _write_checkpoint(folder, aside, config, weights)
        sync_folder(aside)
        aside.rename(out)
        return manifest
    except OSError as error:
        where = error.filename or out
        raise CheckpointError(f"{where} cannot be written ({error.strerror}): nothing was imported.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every parameter of a model, tied ones once."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def _write_checkpoint(
    source: Path, folder: Path, config: ModelConfig, weights: huggingface.HuggingFaceWeights
) -> Manifest:
    entries = []
    for number, tensors in enumerate(weights.batches()):
        entries.append(write_pieces(folder / f"rank-{number:05d}.safetensors", _fragments(tensors)))
    entries += [add_file(folder, name, content) for name, content in huggingface.small_files(source)]
    seq_len = min(config.max_position_embeddings, _EVALUATION_TOKENS)
    manifest = Manifest(
        step=0,
        tokens=0,
        parameters=num_parameters(config),
        layout={"world_size": 1, "imported": True},
        state={},
        config={
            "model": config.model_dump(mode="json"),
            "data": {"seq_len": seq_len, "document_mask": False},
            "train": {"precision": weights.precision},
        },
        versions={"megatrain": __version__, "torch": version("torch")},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=tuple(entries),
    )
    write_file(folder / MANIFEST, manifest.encode())
    return manifest


def _fragments(tensors: Mapping[str, Tensor]) -> list[Fragment]:
    return [
        Fragment(piece, "weight", tensor.flatten())
        for name, tensor in tensors.items()
        for piece, _ in windows(Placement.whole(name, tensor.shape), 0, tensor.numel())
    ]

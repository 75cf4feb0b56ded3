"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megatrain.checkpoint import huggingface
from megatrain.checkpoint.location import Location, new_folder, refuse_existing, write_file
from megatrain.checkpoint.manifest import MANIFEST, Manifest
from megatrain.checkpoint.rank_file import rank_file_name, write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import add_file
from megatrain.checkpoint.stores import resolve
from megatrain.checkpoint.transformers_config import not_in_transformers
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import Fragment, ShardSpec, shard_views
from megatrain.inference.assets import CARRIED, Assets, exported_files
from megatrain.plan.flops import num_parameters, parameter_shapes
from megatrain.version import __version__

_EVALUATION_TOKENS = 1024


class Converted(NamedTuple):
    """What an import or export has made. ``source``: what it was made of; ``notes``: what is to be said of it."""

    source: Path | Location
    num_parameters: int
    notes: list[str]


def export_checkpoint(path: Location, out: Path, shard_bytes: int = huggingface.SHARD_BYTES) -> Converted:
    reader = CheckpointReader(resolve(path))
    saved = reader.saved
    dtype = huggingface.DTYPES[saved.train.precision]
    assets = Assets.of_checkpoint(reader)
    files = exported_files(assets, saved.model, str(dtype).removeprefix("torch."))
    huggingface.export_folder(reader, parameter_shapes(saved.model), dtype, files, out, shard_bytes)
    return Converted(reader.folder, reader.manifest.parameters, [*not_in_transformers(saved.model), *assets.notes])


def import_folder(folder: Path, out: Path) -> Converted:
    """Make a checkpoint of a Hugging Face folder, for ``run.init_from``, eval and generate; it appears when whole.

    Raises CheckpointError where the folder is no model, or not one that can be imported.
    """
    refuse_existing(out)
    config, notes = huggingface.read_config(folder)
    assets = Assets.of_folder(huggingface.read_files(folder, CARRIED))
    weights = huggingface.HuggingFaceWeights(folder, parameter_shapes(config))
    if others := huggingface.left_out(folder, CARRIED):
        notes.append(f"left out: {', '.join(others)}.")
    with new_folder(out, "imported") as unfinished:
        _write_checkpoint(unfinished, config, weights, assets)
    return Converted(folder, num_parameters(config), notes)


def _write_checkpoint(
    folder: Path, config: ModelConfig, weights: huggingface.HuggingFaceWeights, assets: Assets
) -> None:
    entries = []
    for number, tensors in enumerate(weights.batches()):
        entries.append(write_rank_file(folder / rank_file_name(number), _fragments(tensors)))
    entries += [add_file(folder, name, content) for name, content in assets.files.items()]
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
        special_tokens=assets.special_tokens,
    )
    write_file(folder / MANIFEST, manifest.encode())


def _fragments(tensors: Mapping[str, Tensor]) -> list[Fragment]:
    return [
        Fragment(shard, "weight", tensor.flatten())
        for name, tensor in tensors.items()
        for shard, _ in shard_views(ShardSpec.whole(name, tensor.shape), 0, tensor.numel())
    ]

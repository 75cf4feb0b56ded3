"""Checkpoints to Hugging Face folders and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from torch import Tensor

from megatrain.checkpoint import adapters, huggingface, image_processor
from megatrain.checkpoint.image_processor import PREPROCESSOR
from megatrain.checkpoint.location import Location, address, new_folder, refuse_existing, write_file
from megatrain.checkpoint.manifest import MANIFEST, TOKENIZER, Base, Manifest
from megatrain.checkpoint.rank_file import rank_file_name, write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import add_file
from megatrain.checkpoint.stores import resolve
from megatrain.checkpoint.transformers_config import not_in_transformers
from megatrain.config import LoraConfig, ModelConfig
from megatrain.distributed.fragment import Fragment, ShardSpec, shard_views
from megatrain.errors import ConfigError
from megatrain.inference.assets import CARRIED, TOKENIZER_FILES, Assets, exported_files
from megatrain.plan.flops import adapter_shapes, num_parameters, num_trained_parameters
from megatrain.version import __version__

_EVALUATION_TOKENS = 1024


class Converted(NamedTuple):
    """What an import or export has made. ``source``: what it was made of; ``notes``: what is to be said of it;
    ``reader``: what loads an export."""

    source: Path | Location
    num_parameters: int
    notes: list[str]
    reader: str = "transformers"


def export_checkpoint(
    path: Location, out: Path, shard_bytes: int = huggingface.SHARD_BYTES, *, merge: bool = False, ema: bool = False
) -> Converted:
    """A folder for transformers; of a checkpoint of LoRA's adapters one for peft, or with ``merge`` the adapted model.

    ``ema``: of the averaged weights. Merged weights are summed in fp32, and rounded once to the type that the run
    computed in; adapters stay fp32.
    """
    reader = CheckpointReader(resolve(path), ema=ema)
    saved = reader.saved
    assets, notes = Assets.of_checkpoint(reader), not_in_transformers(saved.model)
    has_encoder = saved.model.description.encoder is not None
    if has_encoder or (assets.prompt_ids and not saved.model.description.can_generate):
        assets = assets.between_borders()
    if merge and saved.lora is None:
        raise ConfigError(f"--merge: {reader.folder} holds whole weights, no LoRA adapters: leave it out.")
    if saved.lora is not None and not merge:
        _export_adapter(reader, saved.lora, assets, out)
        return Converted(reader.folder, reader.manifest.parameters, [*_beside(reader), *notes, *assets.notes], "peft")
    dtype = huggingface.DTYPES[saved.train.precision]
    mask_token = saved.objective.masked_lm.mask_token if saved.objective.of(saved.model) == "masked_lm" else None
    files = exported_files(assets, saved.model, str(dtype).removeprefix("torch."), mask_token)
    eod = assets.special_tokens.eod
    if has_encoder and eod is not None and TOKENIZER not in assets.files:
        notes.append(
            f"a source ends with {eod.token or eod.id}, which no tokenizer of this folder puts there: add it yourself."
        )
    read = partial(adapters.read_merged, reader)
    huggingface.export_folder(read, saved.model, dtype, files, out, shard_bytes)
    return Converted(reader.folder, num_parameters(saved.model), [*notes, *assets.notes])


def _export_adapter(reader: CheckpointReader, lora: LoraConfig, assets: Assets, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, with the tokenizer's files, which may be others than the
    base's."""
    model = reader.saved.model
    exported = exported_files(assets, model, "float32")
    with new_folder(out, "exported") as unfinished:
        shapes = adapter_shapes(model, lora)
        ours = {f"{adapters.PREFIX}{adapters.name_in_peft(model, name)}": name for name in shapes}

        def read(name: str, shape: Sequence[int]) -> Tensor:
            return reader.read_parameter(ShardSpec.whole(ours[name], shape), "weight")

        named = {name: shapes[our_name] for name, our_name in ours.items()}
        huggingface.write_safetensors(read, named, unfinished / adapters.ADAPTER_WEIGHTS, torch.float32)
        huggingface.write_json(unfinished / adapters.ADAPTER_CONFIG, adapters.to_peft(model, lora))
        for name in TOKENIZER_FILES:
            if name in exported:
                write_file(unfinished / name, exported[name])


def _beside(reader: CheckpointReader) -> list[str]:
    base = reader.manifest.base
    assert base is not None
    return [f"peft loads it beside its base: `megatrain export {base.path}` writes that, --merge both as one model."]


def import_folder(folder: Path, out: Path, base: Location | None = None) -> Converted:
    """Make a checkpoint of a Hugging Face folder, for ``run.init_from``, eval and generate; it appears when whole.

    Of a folder of peft's, which holds LoRA's adapters, with the checkpoint ``base`` that they adapt. Raises
    CheckpointError where the folder is no model, or not one that can be imported.
    """
    refuse_existing(out)
    if (folder / adapters.ADAPTER_CONFIG).is_file():
        return _import_adapter(folder, out, base)
    if base is not None:
        raise ConfigError(f"--base belongs to a folder of peft's: {folder} has no {adapters.ADAPTER_CONFIG}.")
    config, notes = huggingface.read_config(folder)
    assets = Assets.of_folder(huggingface.read_files(folder, CARRIED))
    objective = _objective(config, assets, notes)
    weights = huggingface.HuggingFaceWeights(folder, config)
    if others := huggingface.left_out(folder, CARRIED):
        notes.append(f"left out: {', '.join(others)}.")
    with new_folder(out, "imported") as unfinished:
        saved = {
            "model": config.model_dump(mode="json"),
            "train": {"precision": weights.precision},
            "objective": objective,
        }
        manifest = _manifest(config, saved, num_parameters(config), assets)
        write_checkpoint(unfinished, manifest, map(_fragments, weights.batches()), assets)
    return Converted(folder, num_parameters(config), notes)


def _objective(config: ModelConfig, assets: Assets, notes: list[str]) -> dict[str, Any]:
    """What of a folder's files decides what the model reads; ``notes``: is told what is done otherwise."""
    if config.description.reads_images and PREPROCESSOR in assets.files:
        seen, others = image_processor.from_transformers(orjson.loads(assets.files[PREPROCESSOR]), config)
        notes += others
        return {"image_classification": seen.model_dump(mode="json", exclude_defaults=True)}
    if "masked_lm" in config.description.objectives and assets.mask_token:
        return {"masked_lm": {"mask_token": assets.mask_token}}
    return {}


def _import_adapter(folder: Path, out: Path, base: Location | None) -> Converted:
    if base is None:
        raise ConfigError(f"{folder} holds adapters of peft's: give the checkpoint that they adapt with --base.")
    reader = CheckpointReader(resolve(base))
    saved = reader.saved
    if saved.lora is not None:
        raise ConfigError(f"--base {reader.folder} holds LoRA adapters itself: give the checkpoint of whole weights.")
    lora = adapters.from_peft(folder, saved.model)
    tensors = adapters.read_adapter(folder, saved.model, lora)
    assets, size = Assets.of_checkpoint(reader), num_trained_parameters(saved.model, lora)
    known = reader.manifest
    config = {**known.config, "lora": lora.model_dump(mode="json")}
    beside = Base(path=address(reader.folder), digest=known.weights_digest, parameters=known.parameters)
    with new_folder(out, "imported") as unfinished:
        manifest = _manifest(saved.model, config, size, assets).model_copy(update={"base": beside})
        write_checkpoint(unfinished, manifest, [_fragments(tensors)], assets)
    return Converted(folder, size, [])


def _manifest(model: ModelConfig, config: Mapping[str, Any], size: int, assets: Assets) -> Manifest:
    seq_len = model.num_places or min(model.max_position_embeddings, _EVALUATION_TOKENS)
    return Manifest(
        step=0,
        tokens=0,
        parameters=size,
        layout={"world_size": 1, "imported": True},
        state={},
        config={"data": {"seq_len": seq_len, "document_mask": False}, **config},
        versions={"megatrain": __version__, "torch": version("torch")},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=(),
        special_tokens=assets.special_tokens,
        chat=assets.chat,
    )


def write_checkpoint(folder: Path, manifest: Manifest, batches: Iterable[Sequence[Fragment]], assets: Assets) -> None:
    """The files of a checkpoint, one for each batch of fragments, and last ``manifest`` with all of them in it."""
    entries = []
    for number, fragments in enumerate(batches):
        entries.append(write_rank_file(folder / rank_file_name(number), fragments))
    entries += [add_file(folder, name, content) for name, content in assets.files.items()]
    write_file(folder / MANIFEST, manifest.model_copy(update={"files": tuple(entries)}).encode())


def _fragments(tensors: Mapping[str, Tensor]) -> list[Fragment]:
    return [
        Fragment(shard, "weight", tensor.flatten())
        for name, tensor in tensors.items()
        for shard, _ in shard_views(ShardSpec.whole(name, tensor.shape), 0, tensor.numel())
    ]

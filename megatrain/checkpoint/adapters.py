"""LoRA's adapters in peft's folders, both ways, and merged into the weights that they adapt.

A folder has adapter_config.json and adapter_model.safetensors. The factors have our names behind a prefix, and peft's
shapes: A [rank, in], B [out, rank], also where the weight is [in, out] (gpt2's Conv1D, ``fan_in_fan_out``). Where
transformers has other names for modules than for their weights in files (vit), peft's are the modules'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megatrain.checkpoint.huggingface import opened, read_json
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import LoraConfig, ModelConfig
from megatrain.distributed.fragment import ShardSpec
from megatrain.errors import CheckpointError
from megatrain.families.description import ADAPTER_FACTORS, Linear
from megatrain.plan.flops import adapter_shapes

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_A, _B = ADAPTER_FACTORS
_NOT_OURS: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What an adapter that is imported may say of these keys; empty is as good as left out."""


def name_in_peft(model: ModelConfig, name: str) -> str:
    """``name``: ours, of a matrix in its layer or of a factor."""
    for ours, theirs in model.description.hugging_face.modules.items():
        name = name.replace(ours, theirs)
    return name


def _our_name(model: ModelConfig, name: str) -> str:
    for ours, theirs in model.description.hugging_face.modules.items():
        name = name.replace(theirs, ours)
    return name.removeprefix(PREFIX)


def to_peft(model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json. The base is whatever model it is loaded beside."""
    family = model.description
    adapted, of_decoders = family.adapted(lora.adapts), "CAUSAL_LM" if family.can_generate else None
    return {
        "peft_type": "LORA",
        "task_type": of_decoders if family.encoder is None else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [name_in_peft(model, path) for path in adapted],
        "fan_in_fan_out": all(_is_conv1d(model, path) for path in adapted),
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }


def from_peft(folder: Path, model: ModelConfig) -> LoraConfig:
    """What adapter_config.json says; which matrices are adapted the tensors say, for there are many ways to name them.

    Raises CheckpointError, naming the key, for adapters that are not LoRA's alone.
    """
    path = folder / ADAPTER_CONFIG
    theirs = read_json(path)
    for key, needed in _NOT_OURS.items():
        if theirs.get(key, needed) != needed and theirs[key]:
            raise CheckpointError(f"{path}: {key} is {theirs[key]!r}; only adapters with {needed!r} can be imported.")
    with opened(folder / ADAPTER_WEIGHTS) as file:
        modules = {_our_name(model, key).rpartition(f".{_A}.")[0] for key in file.keys()}  # noqa: SIM118
    targets = model.description.adapted(lambda name: any(module.endswith(f".{name}") for module in modules))
    given = {"rank": theirs.get("r"), "alpha": theirs.get("lora_alpha"), "dropout": theirs.get("lora_dropout", 0.0)}
    try:
        return LoraConfig.model_validate({**given, "target_modules": targets})
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {first['loc'][0]}: {first['msg']}.") from None


def read_adapter(folder: Path, model: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The factors as fp32 under our names. Raises CheckpointError for tensors missing, unknown, or of other shapes."""
    path, shapes = folder / ADAPTER_WEIGHTS, adapter_shapes(model, lora)
    with opened(path) as file:
        tensors = {_our_name(model, key): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{path} has {len(unknown)} tensors that the model does not adapt, as {unknown[0]}.")
    if missing := [name for name in shapes if name not in tensors]:
        raise CheckpointError(f"{path} lacks {len(missing)} of the adapters' tensors, among them {missing[0]}.")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensors[name].shape)}, and {list(shape)} here.")
    return {name: tensors[name].contiguous() for name in shapes}


def read_merged(reader: CheckpointReader, name: str, shape: Sequence[int]) -> Tensor:
    """A weight with its adapter, if it has one, added in fp32: W + alpha / rank * B A, transposed where W is."""
    weight, saved = reader.read_parameter(ShardSpec.whole(name, shape), "weight"), reader.saved
    if saved.lora is None:
        return weight
    module = name.removesuffix(".weight")
    shapes = adapter_shapes(saved.model, saved.lora)
    if (name_A := f"{module}.{_A}.weight") not in shapes:
        return weight
    name_B = f"{module}.{_B}.weight"
    a, b = (reader.read_parameter(ShardSpec.whole(factor, shapes[factor]), "weight") for factor in (name_A, name_B))
    place = saved.model.description.in_block(module)
    assert place is not None, "adapters are within layers"
    added, scale = b @ a, saved.lora.alpha / saved.lora.rank
    return torch.add(weight, added.t() if _is_conv1d(saved.model, place[1]) else added, alpha=scale)


def _is_conv1d(model: ModelConfig, path: str) -> bool:
    """``path``: of a matrix in its layer."""
    leaves = (stack.block.leaves.get(path) for stack in model.description.stacks)
    return any(isinstance(leaf, Linear) and leaf.is_conv1d for leaf in leaves)

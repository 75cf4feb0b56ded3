"""config.json of Hugging Face's transformers, and ours: the same models under two sets of keys.

What transformers would compute otherwise than our layers is refused by its key; what it would take for a key that is
left out is taken here too. What is particular to a family its description says (`HuggingFace`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError
from megatrain.families import FAMILIES
from megatrain.families.description import Family

_NAMED_ALIKE = ("vocab_size", "tie_word_embeddings", "initializer_range")  # by every family
_ABSENT = {"tie_word_embeddings": False, "initializer_range": 0.02}
_ROPE_TYPES = ("default", "linear", "llama3")


def to_transformers(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model, but for its special tokens. ``dtype``: torch's name of it."""
    family, known = config.description, config.description.hugging_face
    values = {
        **config.model_dump(exclude_none=True),
        "intermediate_size": config.ffn_size,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "num_decoder_layers": config.num_layers(family.decoder),
    }
    names = {**{key: key for key in _named_alike(family)}, **known.names}
    if known.labels_key:  # what a classifier does not have there
        names = {
            ours: theirs for ours, theirs in names.items() if ours not in (known.labels_key, "tie_word_embeddings")
        }
    rope = {"rope_theta": config.rope_theta, "rope_scaling": values.get("rope_scaling")}
    return {
        "architectures": [known.architecture],
        "model_type": config.family,
        **{theirs: values.get(ours) for ours, theirs in names.items()},
        **{theirs: values.get(ours) for theirs, ours in known.copies.items()},
        **(rope if family.block.attention.rotates else {}),
        **(labels_by_id([f"LABEL_{i}" for i in range(config.num_answers)]) if known.labels_key else {}),
        "torch_dtype": dtype,
        **known.constants,
        **known.required,
    }


def _named_alike(family: Family) -> list[str]:
    """The keys that have one name here and there, of those that the family has."""
    others = {*family.hugging_face.names, *(() if family.initial_deviation is None else ("initializer_range",))}
    return [key for key in _NAMED_ALIKE if key not in others]


def labels_by_id(names: Sequence[str]) -> dict[str, Any]:
    """The keys of config.json that name labels."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def label_names(theirs: Mapping[str, Any]) -> list[str]:
    """The names of labels in a config.json; where it has none, what transformers calls two. Raises CheckpointError
    where a label has none."""
    names = theirs.get("id2label") or {str(number): f"LABEL_{number}" for number in range(2)}
    numbers = [str(number) for number in range(len(names))]
    is_whole = isinstance(names, Mapping) and names.keys() == set(numbers)
    if not is_whole or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"config.json: id2label must have a text for each label, from 0 on, not {names!r:.80}.")
    return [names[number] for number in numbers]


def laid_over(theirs: Mapping[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model that was imported, and perhaps trained on: theirs, with what has become another.

    So keys that mean nothing here stay, and what has several spellings keeps theirs.
    """
    dtype_key = "dtype" if "dtype" in theirs else "torch_dtype"
    before = to_transformers(from_transformers(theirs, Path("config.json")), str(theirs.get(dtype_key)))
    changed = {key: value for key, value in to_transformers(config, dtype).items() if before.get(key, key) != value}
    if "torch_dtype" in changed:
        changed[dtype_key] = changed.pop("torch_dtype")
    kept = {key: value for key, value in theirs.items() if key != "auto_map"}  # code of the folder's own is not carried
    known = config.description.hugging_face
    merged = {**kept, "architectures": [known.architecture], **changed}
    if known.refuse({**_ABSENT, **known.absent, **merged}):  # theirs say another model of a longer context
        merged = {key: value for key, value in merged.items() if key != "layer_types"} | {**known.constants}
    return merged


def not_in_transformers(config: ModelConfig) -> list[str]:
    """What transformers would make of an export of this model otherwise, each in a sentence."""
    known = config.description.hugging_face
    notes = known.warnings(to_transformers(config, ""))
    if "hidden_dropout" not in known.names and config.hidden_dropout:
        notes.append(
            f"transformers has no hidden_dropout in {config.family}: an export does not have that of "
            f"{config.hidden_dropout}."
        )
    rates = known.names.get("attention_dropout"), known.names.get("hidden_dropout")
    if rates[0] == rates[1] and config.attention_dropout != config.hidden_dropout:
        notes.append(
            f"transformers has one rate of dropout in {config.family}, {rates[0]}: an export has that of "
            f"hidden_dropout ({config.hidden_dropout}), not that of attention_dropout ({config.attention_dropout})."
        )
    return notes


def from_transformers(theirs: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model that a config.json (at ``path``, which errors name) describes.

    Raises CheckpointError where it is no model, or one whose layers are not ours, naming the key.
    """
    name = str(theirs.get("model_type"))
    if name not in FAMILIES:
        raise CheckpointError(f"{path}: model_type is {name!r}; {', '.join(FAMILIES)} can be imported.")
    if theirs.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: the weights are quantized (quantization_config); import the model that was quantized."
        )
    family = FAMILIES[name]
    if family.classifier and theirs.get("architectures") == [family.classifier.hugging_face.architecture]:
        family = family.classifier
    known = family.hugging_face
    for key, needed in known.required.items():
        if theirs.get(key, needed) != needed:
            raise CheckpointError(f"{path}: {key} is {theirs[key]!r}; only {needed!r} can be imported.")
    aliased = {known.names[alias]: theirs[alias] for alias in known.aliases if alias in theirs}
    given = {**_ABSENT, **known.absent, **theirs, **aliased}
    given = {**family.implied(given), **given}
    if known.labels_key:
        given |= {known.labels_key: len(label_names(theirs)), "tie_word_embeddings": False}
    missing = [key for key in known.names.values() if key not in given]
    missing += ["vocab_size"] if given.get("vocab_size") is None else []
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: the model's shape is not known.")
    ours = {"family": name, **{key: given[key] for key in _named_alike(family)}}
    ours |= {known.labels_key: given[known.labels_key]} if known.labels_key else {}
    ours |= {key: given[their_key] for key, their_key in known.names.items()}
    ours["attention_dropout"] = ours["attention_dropout"] or 0.0
    try:
        if family.block.attention.rotates:
            ours |= _rope(given, path)
        refusal = known.refuse(given)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a value of the wrong type: {error}.") from None
    if refusal:
        raise CheckpointError(f"{path}: {refusal}")
    try:
        return ModelConfig.model_validate(ours)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {key or 'the model'}: {first['msg']}.") from None


def not_told_apart(theirs: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """Keys of a config.json that one key of ours stands for though they differ, each in a sentence."""
    known = config.description.hugging_face
    given, notes = {**known.absent, **theirs}, []
    for copy, ours in known.copies.items():
        name = known.names[ours]
        if copy in given and given[copy] != given.get(name):
            notes.append(f"{ours} is {name} ({getattr(config, ours)}); it stands for {copy}, too.")
    return notes


def _rope(theirs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Rotary settings: transformers 5 keeps them together under ``rope_parameters``, older ones apart.

    As transformers 5 reads them (``RotaryEmbeddingConfigMixin``): ``rope_scaling`` comes before ``rope_parameters``,
    and an ``original_max_position_embeddings`` beside them before the one in them.
    """
    scaling = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
    theta = scaling.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    rotated = scaling.pop("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise CheckpointError(f"{path}: partial_rotary_factor is {rotated!r}; only whole heads are rotated here.")
    if kind not in _ROPE_TYPES or any(isinstance(value, Mapping) for value in scaling.values()):
        found = repr(kind) if kind not in _ROPE_TYPES else "layers, each in its own way"
        raise CheckpointError(
            f"{path}: rotary frequencies are scaled by {found}; {', '.join(_ROPE_TYPES)} can be imported."
        )
    if kind == "llama3":
        inner = scaling.get("original_max_position_embeddings", theirs["max_position_embeddings"])
        scaling["original_max_position_embeddings"] = theirs.get("original_max_position_embeddings", inner)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}

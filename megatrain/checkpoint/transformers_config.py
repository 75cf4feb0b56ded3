"""config.json of Hugging Face's transformers, and ours: the same models under two sets of keys.

What transformers would compute otherwise than our layers is refused by its key; what it would take for a key that is
left out is taken here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# What of theirs must have one value for the layers to be ours; so it is written, too.
_GATED = {"hidden_act": "silu", "attention_bias": False}
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_GATED, "mlp_bias": False},
    "mistral": _GATED,
    "qwen3": _GATED,
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "layer_norm_epsilon": "layer_norm_epsilon",
}
# The names that all of transformers' configs answer to; where gpt2's own is there too, these come before it.
_GPT2_ALIASES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_NAMES = {
    key: key
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
    )
}
_LLAMA_ABSENT = {"head_dim": None, "rms_norm_eps": 1e-6, "attention_dropout": 0.0}
_GPT2_DROPOUTS = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
# What transformers takes for a key that a config.json leaves out. Sizes that are not here must be given.
_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_LLAMA_ABSENT, "num_key_value_heads": None, "max_position_embeddings": 2048},
    "mistral": {**_LLAMA_ABSENT, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen3": {
        **_LLAMA_ABSENT,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "gpt2": {"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5, **dict.fromkeys(_GPT2_DROPOUTS, 0.1)},
}
_ROPE_TYPES = ("default", "linear", "llama3")


def to_transformers(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model, but for its special tokens. ``dtype``: torch's name of it."""
    common = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        **_REQUIRED[config.family],
    }
    if config.family == "gpt2":
        named = {theirs: getattr(config, ours) for ours, theirs in _GPT2_NAMES.items()}
        dropout = {"attn_pdrop": config.attention_dropout}
        dropout |= dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.hidden_dropout)
        return {**named, "n_ctx": config.max_position_embeddings, **dropout, **common}
    named = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    named |= {
        "intermediate_size": config.ffn_size,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else None,
        "attention_dropout": config.attention_dropout,
        "sliding_window": None,
    }
    if config.family == "qwen3":
        named["use_sliding_window"] = False
    return {**named, **common}


def laid_over(theirs: Mapping[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model that was imported, and perhaps trained on: theirs, with what has become another.

    So keys that mean nothing here stay, and what has several spellings keeps theirs.
    """
    dtype_key = "dtype" if "dtype" in theirs else "torch_dtype"
    before = to_transformers(from_transformers(theirs, Path("config.json")), str(theirs.get(dtype_key)))
    changed = {key: value for key, value in to_transformers(config, dtype).items() if before[key] != value}
    if "torch_dtype" in changed:
        changed[dtype_key] = changed.pop("torch_dtype")
    kept = {key: value for key, value in theirs.items() if key != "auto_map"}  # code of the folder's own is not carried
    return {**kept, "architectures": [ARCHITECTURES[config.family]], **changed}


def not_in_transformers(config: ModelConfig) -> list[str]:
    """What transformers would make of an export of this model otherwise, each in a sentence."""
    notes = []
    if config.family == "llama" and config.hidden_size % config.num_attention_heads:
        notes.append(
            f"transformers 5 does not load a llama whose hidden_size ({config.hidden_size}) is no multiple of "
            f"num_attention_heads ({config.num_attention_heads}); transformers 4 does. Family mistral is the same "
            "model, and both load it."
        )
    if config.family == "llama" and config.initializer_range > 1.0:
        notes.append(
            f"transformers 5 does not load a llama whose initializer_range ({config.initializer_range}) is over 1.0."
        )
    if config.family != "gpt2" and config.hidden_dropout:
        notes.append(
            f"transformers has no hidden_dropout in {config.family}: an export does not have that of "
            f"{config.hidden_dropout}."
        )
    return notes


def from_transformers(theirs: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model that a config.json (at ``path``, which errors name) describes.

    Raises CheckpointError where it is no model, or one whose layers are not ours, naming the key.
    """
    family = str(theirs.get("model_type"))
    if family not in ARCHITECTURES:
        raise CheckpointError(f"{path}: model_type is {family!r}; {', '.join(ARCHITECTURES)} can be imported.")
    if theirs.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: the weights are quantized (quantization_config); import the model that was quantized."
        )
    for key, needed in _REQUIRED[family].items():
        if theirs.get(key, needed) != needed:
            raise CheckpointError(f"{path}: {key} is {theirs[key]!r}; only {needed!r} can be imported.")
    given = {**_ABSENT[family], **theirs}
    if family == "gpt2":
        given |= {_GPT2_NAMES[alias]: theirs[alias] for alias in _GPT2_ALIASES if alias in theirs}
    names = _GPT2_NAMES if family == "gpt2" else _NAMES
    missing = [name for name in names.values() if name not in given]
    missing += ["vocab_size"] if given.get("vocab_size") is None else []
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: the model's shape is not known.")
    ours = {ours: given[name] for ours, name in names.items()}
    if family == "gpt2":
        ours |= {"attention_dropout": given["attn_pdrop"], "hidden_dropout": given["resid_pdrop"]}
    else:
        try:
            ours |= _rope(given, path)
            _refuse_window(family, given, path)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a value of the wrong type: {error}.") from None
        ours["attention_dropout"] = given["attention_dropout"] or 0.0
    ours |= {"family": family, "vocab_size": given["vocab_size"]}
    ours["tie_word_embeddings"] = theirs.get("tie_word_embeddings", family == "gpt2")
    ours["initializer_range"] = theirs.get("initializer_range", 0.02)
    try:
        return ModelConfig.model_validate(ours)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {key or 'the model'}: {first['msg']}.") from None


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


def _refuse_window(family: str, given: Mapping[str, Any], path: Path) -> None:
    """A window of attention at least as long as the context changes nothing; a shorter one is another model.

    mistral has it in every layer. qwen3 has it in those that ``layer_types`` says, else from ``max_window_layers`` on.
    """
    window, longest = given.get("sliding_window"), given["max_position_embeddings"]
    if family == "qwen3":
        window = window if given.get("use_sliding_window") else None
        num_layers = given["num_hidden_layers"]
        kinds = given.get("layer_types")
        if kinds is None:
            slides = window is not None and given["max_window_layers"] < num_layers
            kinds = ["sliding_attention" if slides else "full_attention"]
        others = set(kinds) - {"full_attention"}
        if others and (window is None or others != {"sliding_attention"}):
            raise CheckpointError(
                f"{path}: layer_types has {', '.join(map(repr, sorted(others)))}; full attention is done."
            )
        window = window if others else None
    if family in ("mistral", "qwen3") and window is not None and window < longest:
        raise CheckpointError(
            f"{path}: attention is limited to a window of {window} tokens (sliding_window), where "
            f"max_position_embeddings is {longest}; here each token sees all before it. Up to {window} tokens both are "
            f"the same: set max_position_embeddings to {window} in config.json to import the model for that context."
        )

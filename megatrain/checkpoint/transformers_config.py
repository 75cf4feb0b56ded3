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
# What transformers takes for a key that a config.json leaves out. Sizes that are not here must be given.
_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    "gpt2": {"n_positions": 1024, "n_inner": None, "layer_norm_epsilon": 1e-5},
}
_DEFAULT_WINDOW = 4096
_ROPE_TYPES = ("default", "linear", "llama3")


def to_transformers(config: ModelConfig, dtype: str, special_ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model. ``dtype``: torch's name of it; ``special_ids``: bos_token_id and eos_token_id."""
    common = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        **special_ids,
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
    names = _GPT2_NAMES if family == "gpt2" else _NAMES
    missing = [name for name in names.values() if name not in given]
    missing += ["vocab_size"] if given.get("vocab_size") is None else []
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: the model's shape is not known.")
    ours = {ours: given[name] for ours, name in names.items()}
    if family != "gpt2":
        try:
            ours |= _rope(theirs, path)
            _refuse_window(family, given, path)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a value of the wrong type: {error}.") from None
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
    """Rotary settings: transformers 5 keeps them together under ``rope_parameters``, older ones apart."""
    together = theirs.get("rope_parameters") or {}
    scaling = dict(theirs.get("rope_scaling") or together)
    theta = scaling.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    rotated = scaling.pop("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise CheckpointError(f"{path}: partial_rotary_factor is {rotated!r}; only whole heads are rotated here.")
    if kind not in _ROPE_TYPES:
        raise CheckpointError(
            f"{path}: rotary frequencies are scaled by {kind!r}; {', '.join(_ROPE_TYPES)} can be imported."
        )
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def _refuse_window(family: str, given: Mapping[str, Any], path: Path) -> None:
    """A window of attention at least as long as the context changes nothing; a shorter one is another model."""
    has_window = family == "mistral" or given.get("use_sliding_window", False)
    window = given.get("sliding_window", _DEFAULT_WINDOW) if has_window else None
    kinds = set(given.get("layer_types") or ()) - {"full_attention"}
    if kinds and (window is None or kinds != {"sliding_attention"}):
        raise CheckpointError(f"{path}: layer_types has {', '.join(map(repr, sorted(kinds)))}; full attention is done.")
    longest = given["max_position_embeddings"]
    if window is not None and window < longest:
        raise CheckpointError(
            f"{path}: attention is limited to a window of {window} tokens (sliding_window), where "
            f"max_position_embeddings is {longest}; here each token sees all before it. Up to {window} tokens both are "
            f"the same: set max_position_embeddings to {window} in config.json to import the model for that context."
        )

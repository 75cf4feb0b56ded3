"""Hugging Face folders to checkpoints and back, tensor by tensor: the same names, the same numbers.

A folder has config.json, model.safetensors (or several with an index), tokenizer.json and a few small files. Pickled
weights (``.bin``) are not read: loading one can run code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import sync_folder, write_synced
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import Placement
from megatrain.errors import CheckpointError, ConfigError

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
SHARD_BYTES = 2 << 30
_MAX_JSON_BYTES = 64 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Keys that both sides have under other names, and what of theirs must have one value for the layers to be ours.
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
}
_LLAMA_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def export_folder(reader: CheckpointReader, shapes: Mapping[str, Sequence[int]], out: Path) -> None:
    """Write the checkpoint as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    ``shapes``: the model's parameters, tied ones once. Weights get the type the run computed in. The folder appears
    when it is whole. Raises ConfigError where ``out`` exists, CheckpointError for a damaged checkpoint or a full disk.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: give --out a folder that does not, or remove that one.")
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        config = ModelConfig.model_validate(reader.manifest.config["model"])
        precision = reader.manifest.config["train"]["precision"]
        _export_weights(reader, shapes, aside, _DTYPES[precision])
        eos = _export_tokenizer(reader.folder, aside, config)
        _write_json(aside / CONFIG, to_transformers(config, _DTYPE_NAMES[precision], eos))
        _write_json(aside / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos, "do_sample": True})
        sync_folder(aside)
        aside.rename(out)
    except OSError as error:
        where = error.filename or out
        raise CheckpointError(f"{where} cannot be written ({error.strerror}): nothing was exported.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def to_transformers(config: ModelConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json of a model, as transformers writes it."""
    common = {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
    }
    if config.family == "gpt2":
        named = {theirs: getattr(config, ours) for ours, theirs in _GPT2_NAMES.items()}
        dropout = {"attn_pdrop": config.attention_dropout}
        dropout |= dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.hidden_dropout)
        norm = {"layer_norm_epsilon": config.layer_norm_epsilon, "n_ctx": config.max_position_embeddings}
        kind = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return {**kind, **named, **norm, **dropout, **_REQUIRED["gpt2"], **common}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    named = {key: getattr(config, key) for key in _LLAMA_KEYS}
    named |= {
        "intermediate_size": config.ffn_size,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
    }
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else None
    dropout = {"attention_dropout": config.attention_dropout}
    return {**kind, **named, "rope_scaling": scaling, **dropout, **_REQUIRED["llama"], **common}


def from_transformers(folder: Path) -> tuple[ModelConfig, str]:
    """The model that a folder's config.json describes, and the precision of its weights.

    Raises CheckpointError where it is no model, or one whose layers are not ours, naming the key.
    """
    theirs = read_json(folder / CONFIG)
    family = str(theirs.get("model_type"))
    if family not in _REQUIRED:
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {family!r}; {' and '.join(_REQUIRED)} can be imported."
        )
    for key, needed in _REQUIRED[family].items():
        if theirs.get(key, needed) != needed:
            raise CheckpointError(f"{folder / CONFIG}: {key} is {theirs[key]!r}; only {needed!r} can be imported.")
    if family == "gpt2":
        ours = {ours: theirs.get(name) for ours, name in _GPT2_NAMES.items()}
        ours["layer_norm_epsilon"] = theirs.get("layer_norm_epsilon", 1e-5)
    else:
        ours = {key: theirs[key] for key in _LLAMA_KEYS if theirs.get(key) is not None}
        ours |= _rope(theirs)
    tied = theirs.get("tie_word_embeddings", family == "gpt2")
    ours |= {"family": family, "vocab_size": theirs.get("vocab_size"), "tie_word_embeddings": tied}
    ours["initializer_range"] = theirs.get("initializer_range", 0.02)
    dtype = theirs.get("torch_dtype") or theirs.get("dtype") or "float32"
    precision = next((name for name, known in _DTYPE_NAMES.items() if known == dtype), None)
    if precision is None:
        raise CheckpointError(f"{folder / CONFIG}: weights of type {dtype!r} cannot be imported.")
    try:
        return ModelConfig.model_validate(ours), precision
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder / CONFIG}: {key or 'the model'}: {first['msg']}.") from None


def import_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The folder's weights file by file: its name, and the tensors of ``shapes`` in it, as fp32.

    Raises CheckpointError, naming file and tensor, where one is missing, damaged, or of another shape.
    """
    missing = dict(shapes)
    prefix = next(iter(shapes)).partition(".")[0] + "."
    for name in _weight_files(folder):
        path = folder / name
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    ours = key if key in shapes else prefix + key  # a base model's names lack the prefix
                    if ours not in missing:
                        continue  # buffers of older versions, a tied head
                    tensor = file.get_tensor(key)
                    if tuple(tensor.shape) != tuple(shapes[ours]):
                        raise CheckpointError(
                            f"{path}: {key} has shape {list(tensor.shape)}; by {CONFIG} it is {list(shapes[ours])}."
                        )
                    tensors[ours] = tensor.float()
                    del missing[ours]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from None
        yield name, tensors
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's tensors, among them {next(iter(missing))}."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is far too large for what it should be.")
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no Hugging Face model folder: it has no {path.name}.") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def _export_weights(
    reader: CheckpointReader, shapes: Mapping[str, Sequence[int]], folder: Path, dtype: torch.dtype
) -> None:
    """In files of at most SHARD_BYTES (a larger tensor has one of its own), only one of them in memory at a time."""
    plan: list[list[str]] = [[]]
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    for name in shapes:
        if plan[-1] and sum(sizes[other] for other in plan[-1]) + sizes[name] > SHARD_BYTES:
            plan.append([])
        plan[-1].append(name)
    files = (
        [WEIGHTS] if len(plan) == 1 else [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    )
    for file, names in zip(files, plan, strict=True):
        tensors = {n: reader.read_parameter(Placement.whole(n, shapes[n]), "weight").to(dtype) for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        where = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def _export_tokenizer(source: Path, folder: Path, config: ModelConfig) -> int | None:
    """Copy the tokenizer and say what its special token is; that token's id, None where there is no tokenizer."""
    path = source / TOKENIZER
    if not path.exists():
        return None
    tokenizer = read_json(path)
    write_synced(folder / TOKENIZER, path.read_bytes())
    special = next((t for t in tokenizer.get("added_tokens", []) if t.get("special")), None)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if special:
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), special["content"])
    _write_json(folder / "tokenizer_config.json", settings)
    return special["id"] if special else None


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{folder / INDEX}: its weight_map is not one of plain file names.")
        return sorted(set(names.values()))
    if not (folder / WEIGHTS).exists():
        pickled = " Pickled weights (.bin) are not read: they can run code." if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}.{pickled}")
    return [WEIGHTS]


def _rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: transformers 5 keeps them together under ``rope_parameters``, older ones apart."""
    together = theirs.get("rope_parameters") or {}
    scaling = dict(theirs.get("rope_scaling") or together)
    theta = scaling.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    kind = scaling.pop("type", scaling.get("rope_type", "default"))
    scaling["rope_type"] = kind
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_synced(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

"""Hugging Face folders to checkpoints and back, tensor by tensor: the same names, the same numbers.

A folder has config.json, model.safetensors (or several with an index), tokenizer.json and a few small files. Pickled
weights (``.bin``) are not read: loading one can run code.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.checkpoint.location import create, list_folder, sync_folder, write_all, write_file
from megatrain.checkpoint.pieces import DTYPE_CODES, tensor_bytes
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import SavedConfig
from megatrain.checkpoint.transformers_config import from_transformers, to_transformers
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import Placement
from megatrain.errors import CheckpointError, ConfigError

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
SMALL_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION)  # kept as they are, both ways
SHARD_BYTES = 2 << 30
BATCH_BYTES = 1 << 30
_MAX_JSON_BYTES = 64 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_END_OF_TEXT = "<|endoftext|>"
# Buffers that older versions of transformers saved beside the weights.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$")


def export_folder(
    reader: CheckpointReader,
    saved: SavedConfig,
    shapes: Mapping[str, Sequence[int]],
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    ``shapes``: the model's parameters, tied ones once. Weights get the type the run computed in, in files of at most
    ``shard_bytes`` (a larger tensor has one of its own); one tensor at a time is in memory. The folder appears when it
    is whole. Raises ConfigError where ``out`` exists, CheckpointError for a damaged checkpoint or a full disk.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: give --out a folder that does not, or remove that one.")
    aside = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        dtype = _DTYPES[saved.train.precision]
        _export_weights(reader, shapes, aside, dtype, shard_bytes)
        special_ids = _export_small_files(reader, aside, saved.model)
        _write_json(aside / CONFIG, to_transformers(saved.model, str(dtype).removeprefix("torch."), special_ids))
        sync_folder(aside)
        aside.rename(out)
    except OSError as error:
        where = error.filename or out
        raise CheckpointError(f"{where} cannot be written ({error.strerror}): nothing was exported.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes. Raises CheckpointError where it cannot be imported."""
    return from_transformers(read_json(folder / CONFIG), folder / CONFIG)


def refuse_too_small(folder: Path, num_parameters: int) -> None:
    """Raise CheckpointError where a folder's weights cannot be those of so many parameters: no model is made then."""
    sizes = list_folder(folder)
    held = sum(sizes.get(file, 0) for file in _weight_files(folder))
    if held < num_parameters * min(dtype.itemsize for dtype in _DTYPES.values()):
        raise CheckpointError(
            f"{folder}: its weights have {held:,} bytes, too few for the {num_parameters:,} parameters that {CONFIG} "
            "describes."
        )


class HuggingFaceWeights:
    """The weights of a folder, of which only the headers are read at first.

    ``shapes``: the model's parameters. Raises CheckpointError, naming file and tensor, where one is missing, unknown,
    of another shape, of a type that is no plain floating point, or where a file is damaged.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._folder, self._shapes = folder, shapes
        self._prefix = next(iter(shapes)).partition(".")[0] + "."
        self._files: dict[str, list[str]] = {}
        types: set[str] = set()
        for file in _weight_files(folder):
            with _opened(folder / file) as tensors:
                self._files[file] = [key for key in tensors.keys() if self._is_parameter(folder / file, key)]  # noqa: SIM118
                types |= {self._check(folder / file, key, tensors.get_slice(key)) for key in self._files[file]}
        found = Counter(self._ours(key) for keys in self._files.values() for key in keys)
        if missing := [name for name in shapes if name not in found]:
            raise CheckpointError(f"{folder} lacks {len(missing)} of the model's tensors, among them {missing[0]}.")
        if twice := [name for name, count in found.items() if count > 1]:
            raise CheckpointError(f"{folder} has {len(twice)} of the model's tensors twice, among them {twice[0]}.")
        # The type that holds all of them exactly, whatever config.json calls the model.
        self.precision = _PRECISIONS[types.pop()] if len(types) == 1 else "fp32"

    def batches(self, batch_bytes: int = BATCH_BYTES) -> Iterator[dict[str, Tensor]]:
        """The parameters as fp32 under their canonical names, so many at a time as fill ``batch_bytes``."""
        batch: dict[str, Tensor] = {}
        for file, keys in self._files.items():
            for key in keys:
                with _opened(self._folder / file) as tensors:  # opened anew: a mapping would keep all it has read
                    tensor = tensors.get_tensor(key).float()
                if batch and sum(other.nbytes for other in batch.values()) + tensor.nbytes > batch_bytes:
                    yield batch
                    batch = {}
                batch[self._ours(key)] = tensor
        yield batch

    def _ours(self, key: str) -> str:
        return key if key in self._shapes else self._prefix + key  # a base model's names lack the prefix

    def _is_parameter(self, path: Path, key: str) -> bool:
        if self._ours(key) in self._shapes:
            return True
        if key != "lm_head.weight" and not _BUFFERS.search(key):  # a head that is here is one that is tied
            raise CheckpointError(f"{path}: {key} is no tensor of the model that {CONFIG} describes.")
        return False

    def _check(self, path: Path, key: str, tensor: Any) -> str:
        shape, expected = list(tensor.get_shape()), list(self._shapes[self._ours(key)])
        if shape != expected:
            raise CheckpointError(f"{path}: {key} has shape {shape}; by {CONFIG} it is {expected}.")
        dtype = str(tensor.get_dtype())
        if dtype not in _PRECISIONS:
            raise CheckpointError(f"{path}: {key} is of type {dtype}; {', '.join(_PRECISIONS)} can be imported.")
        return dtype


def small_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of what a folder has beside weights and config.json: the tokenizer, and how to generate."""
    for name in SMALL_FILES:
        if (folder / name).exists():
            read_json(folder / name)
            yield name, (folder / name).read_bytes()


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
    reader: CheckpointReader, shapes: Mapping[str, Sequence[int]], folder: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    plan: list[list[str]] = [[]]
    for name in shapes:
        if plan[-1] and sum(sizes[other] for other in plan[-1]) + sizes[name] > shard_bytes:
            plan.append([])
        plan[-1].append(name)
    files = (
        [WEIGHTS] if len(plan) == 1 else [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]
    )
    for file, names in zip(files, plan, strict=True):
        _write_shard(reader, {name: shapes[name] for name in names}, folder / file, dtype)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def _write_shard(reader: CheckpointReader, shapes: Mapping[str, Sequence[int]], path: Path, dtype: torch.dtype) -> None:
    """A safetensors file, written tensor by tensor (the library wants all of them at once)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    with create(path) as file:
        write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, shape in shapes.items():
            tensor = reader.read_parameter(Placement.whole(name, shape), "weight").to(dtype)
            write_all(file, tensor_bytes(tensor))


def _export_small_files(reader: CheckpointReader, folder: Path, config: ModelConfig) -> dict[str, Any]:
    """What was imported goes out as it was; the rest is made from the tokenizer. The special ids for config.json."""
    kept = {entry.file for entry in reader.manifest.files} & set(SMALL_FILES)
    for name in kept:
        write_file(folder / name, reader.read_file(name))
    tokenizer = read_json(folder / TOKENIZER) if TOKENIZER in kept else {}
    added = _special_tokens(tokenizer)
    end = next((token for token in added if token["content"] == _END_OF_TEXT), added[0] if added else None)
    if TOKENIZER in kept and TOKENIZER_CONFIG not in kept:
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        if end:
            settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end["content"])
        _write_json(folder / TOKENIZER_CONFIG, settings)
    if GENERATION not in kept:
        ids = dict.fromkeys(("bos_token_id", "eos_token_id"), end["id"] if end else None)
        _write_json(folder / GENERATION, {**ids, "do_sample": True})
    generation = read_json(folder / GENERATION)
    return {key: generation.get(key) for key in ("bos_token_id", "eos_token_id")}


def _special_tokens(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of a tokenizer.json, which may be anyone's."""
    added = tokenizer.get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    return [entry for entry in entries if entry.get("special") and {"content", "id"} <= entry.keys()]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from None


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

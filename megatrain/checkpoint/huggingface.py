"""Hugging Face folders to checkpoints and back, tensor by tensor: the same names, the same numbers.

A folder has config.json, model.safetensors (or several with an index), tokenizer.json and a few small files. Pickled
weights (``.bin``) are not read: loading one can run code.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.checkpoint.location import create, new_folder, write_all, write_file
from megatrain.checkpoint.rank_file import DTYPE_CODES, tensor_bytes
from megatrain.checkpoint.transformers_config import from_transformers, not_told_apart
from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError
from megatrain.plan.flops import num_parameters, parameter_shapes

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
Read: TypeAlias = Callable[[str, Sequence[int]], Tensor]
"""The parameter of this name and shape, in fp32."""
SHARD_BYTES = 2 << 30
BATCH_BYTES = 1 << 30
_MAX_JSON_BYTES = 64 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_FILE_BYTES = 256 << 20
# What older versions of transformers saved beside the weights: buffers, and of T5 second names and an unused table.
_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$"
    r"|^(encoder|decoder)\.embed_tokens\.weight$|\.EncDecAttention\.relative_attention_bias\.weight$"
)
_OLD_ENDS = {".gamma": ".weight", ".beta": ".bias"}
"""Of norms, as models of TensorFlow and the first versions of transformers have them."""


def export_folder(
    read: Read,
    model: ModelConfig,
    dtype: torch.dtype,
    files: Mapping[str, bytes],
    out: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Tied weights are there once. They get the type ``dtype``, in files of at most ``shard_bytes`` (a larger tensor has
    one of its own); one tensor at a time is in memory. ``files``: what stands beside them. The folder appears when it
    is whole. Raises ConfigError where ``out`` exists, CheckpointError for a damaged checkpoint or a full disk.
    """
    known = model.description.hugging_face
    renamed = {**known.parameters, **known.one_row}
    ours = {theirs: name for name, theirs in renamed.items()}
    own_shapes = parameter_shapes(model)
    shapes = {renamed.get(name, name): _their_shape(model, name, shape) for name, shape in own_shapes.items()}
    if not model.is_tied:  # then both of the names are read, each as a weight of its own
        shapes |= {name: shapes[theirs] for name, theirs in known.parameters.items()}

    def read_as_theirs(name: str, shape: Sequence[int]) -> Tensor:
        own = ours.get(name, name)
        return read(own, own_shapes[own]).view(*shape)

    with new_folder(out, "exported") as unfinished:
        _export_weights(read_as_theirs, shapes, unfinished, dtype, shard_bytes)
        for name, content in files.items():
            write_file(unfinished / name, content)


def _their_shape(model: ModelConfig, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a parameter of ours, in a folder of transformers."""
    return (1, *shape) if name in model.description.hugging_face.one_row else tuple(shape)


def read_config(folder: Path) -> tuple[ModelConfig, list[str]]:
    """The model in a folder, by its config.json and its weights; and what is to be said of it.

    Where config.json says that head and embedding are one, and the weights have a head of its own that differs,
    transformers uses that, and so it is not tied here. Raises CheckpointError where the model cannot be imported.
    """
    theirs = read_json(folder / CONFIG)
    config, notes = from_transformers(theirs, folder / CONFIG), []
    _refuse_too_small(folder, config)
    if config.is_tied and _has_head_of_its_own(folder, config):
        config = config.model_copy(update={"tie_word_embeddings": False})
        notes.append(f"{CONFIG} ties head and embedding, but the weights have two that differ: they are not tied.")
    return config, notes + not_told_apart(theirs, config)


def _refuse_too_small(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError where a folder's weights cannot be those of the model: nothing is made of it then."""
    held = sum((folder / file).stat().st_size for file in _weight_files(folder))
    if held < num_parameters(config) * min(dtype.itemsize for dtype in DTYPES.values()):
        raise CheckpointError(
            f"{folder}: its weights have {held:,} bytes, too few for the {num_parameters(config):,} parameters that "
            f"{CONFIG} describes."
        )


def _has_head_of_its_own(folder: Path, config: ModelConfig) -> bool:
    """Whether the weights hold an output head that is not the token embedding; compared some rows at a time."""
    embedding_name = f"{config.description.embeddings[0].name}.weight"
    embedding_names = {embedding_name, embedding_name.partition(".")[2]}  # a base model's names lack the prefix
    head_name = f"{config.description.head.name}.weight"
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}
        for file in _weight_files(folder):
            tensors = stack.enter_context(opened(folder / file))
            found |= {k: tensors.get_slice(k) for k in tensors.keys() if k == head_name or k in embedding_names}  # noqa: SIM118
        head = found.pop(head_name, None)
        if head is None or not found:
            return False
        embedding = next(iter(found.values()))
        num_rows, width = head.get_shape()
        if embedding.get_shape() != [num_rows, width]:
            return True
        rows = max(1, BATCH_BYTES // (16 * width))
        return any(
            not torch.equal(head[begin : begin + rows].float(), embedding[begin : begin + rows].float())
            for begin in range(0, num_rows, rows)
        )


class HuggingFaceWeights:
    """The weights of ``model`` in a folder, of which only the headers are read at first.

    Raises CheckpointError, naming file and tensor, where one is missing, unknown,
    of another shape, of a type that is no plain floating point, or where a file is damaged.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        known = model.description.hugging_face
        self._folder, self._shapes = folder, (shapes := parameter_shapes(model))
        self._their_shapes = {name: _their_shape(model, name, shape) for name, shape in shapes.items()}
        self._renamed = {theirs: name for name, theirs in {**known.parameters, **known.one_row}.items()}
        self._unread = re.compile("|".join((_BUFFERS.pattern, *(f"^{pattern}$" for pattern in known.unread))))
        self._head = f"{model.description.head.name}.weight"
        self._embedding = f"{model.description.embeddings[0].name}.weight"
        self._prefix = next(iter(shapes)).partition(".")[0] + "."
        keys = {file: _keys(folder / file) for file in _weight_files(folder)}
        every = {key for in_file in keys.values() for key in in_file}
        names = {self._ours(key) for key in every if key != self._head}
        # What is there under another name too: a tied head, by read_config, and what they name otherwise, which is ours
        # where the two are tied, else theirs.
        both = {theirs for theirs, name in self._renamed.items() if {theirs, name} <= every}
        self._dropped = {self._renamed[key] for key in both} if model.is_tied else both
        self._dropped |= {self._head} if self._head not in shapes and self._embedding in names else set()
        self._files = {f: [k for k in in_file if self._is_parameter(folder / f, k)] for f, in_file in keys.items()}
        types: set[str] = set()
        for file in self._files:
            with opened(folder / file) as tensors:
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
                with opened(self._folder / file) as tensors:  # opened anew: a mapping would keep all it has read
                    tensor = tensors.get_tensor(key).float()
                if batch and sum(other.nbytes for other in batch.values()) + tensor.nbytes > batch_bytes:
                    yield batch
                    batch = {}
                batch[self._ours(key)] = tensor.view(*self._shapes[self._ours(key)])
        yield batch

    def _ours(self, key: str) -> str:
        for old, new in _OLD_ENDS.items():
            key = key.removesuffix(old) + new if key.endswith(old) else key
        key = self._renamed.get(key, key)
        if key == self._head and self._head not in self._shapes:  # tied, under the other of its names
            return self._embedding
        return key if key in self._shapes else self._prefix + key  # a base model's names lack the prefix

    def _is_parameter(self, path: Path, key: str) -> bool:
        if key in self._dropped:
            return False
        if self._ours(key) in self._shapes:
            return True
        if not self._unread.search(key) and not self._unread.search(self._prefix + key):
            raise CheckpointError(f"{path}: {key} is no tensor of the model that {CONFIG} describes.")
        return False

    def _check(self, path: Path, key: str, tensor: Any) -> str:
        shape, expected = list(tensor.get_shape()), list(self._their_shapes[self._ours(key)])
        if shape != expected:
            raise CheckpointError(f"{path}: {key} has shape {shape}; by {CONFIG} it is {expected}.")
        dtype = str(tensor.get_dtype())
        if dtype not in _PRECISIONS:
            raise CheckpointError(f"{path}: {key} is of type {dtype}; {', '.join(_PRECISIONS)} can be imported.")
        return dtype


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Those of ``names`` that a folder has. Raises CheckpointError naming one that is not what it should be."""
    found = {name: _content(folder / name, _MAX_FILE_BYTES) for name in names if os.path.lexists(folder / name)}
    for name in found:
        if name.endswith(".json"):
            read_json(folder / name)
    return found


def left_out(folder: Path, carried: Sequence[str]) -> list[str]:
    """What else lies in a folder, beside its weights: files and folders, hidden ones passed over."""
    known = {*carried, INDEX, *_weight_files(folder)}
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises CheckpointError naming the file."""
    content = _content(path, _MAX_JSON_BYTES)
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def _content(path: Path, most_bytes: int) -> bytes:
    _refuse_stand_in(path)
    try:
        if path.stat().st_size > most_bytes:
            raise CheckpointError(f"{path} is far too large for what it should be.")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no Hugging Face model folder: it has no {path.name}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError for what stands where a file should be, after a download that is not whole."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to {path.readlink()}, which is not there: download it again.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: `git lfs pull` fetches it.")


def _export_weights(
    read: Read, shapes: Mapping[str, Sequence[int]], folder: Path, dtype: torch.dtype, shard_bytes: int
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
        write_safetensors(read, {name: shapes[name] for name in names}, folder / file, dtype)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def write_safetensors(read: Read, shapes: Mapping[str, Sequence[int]], path: Path, dtype: torch.dtype) -> None:
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
            write_all(file, tensor_bytes(read(name, shape).to(dtype).contiguous()))


def _keys(path: Path) -> list[str]:
    with opened(path) as tensors:
        return list(tensors.keys())


def opened(path: Path) -> Any:
    """A safetensors file. Raises CheckpointError where it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from None


def _weight_files(folder: Path) -> list[str]:
    """The files that hold the weights, all there: one, or where it is missing those of the index, as transformers."""
    if os.path.lexists(folder / WEIGHTS):
        names = {WEIGHTS}
    elif (folder / INDEX).exists():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(n, str) and Path(n).name == n for n in listed.values()):
            raise CheckpointError(f"{folder / INDEX}: its weight_map is not one of plain file names.")
        names = set(listed.values())
    else:
        pickled = " Pickled weights (.bin) are not read: they can run code." if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS} and no {INDEX}.{pickled}")
    for name in sorted(names):
        _refuse_stand_in(folder / name)
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder / missing[0]} is missing: {len(missing)} of the {len(names)} files that {INDEX} names are not "
            "there. Download the folder again."
        )
    return sorted(names)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

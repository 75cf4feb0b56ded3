from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from checkpoint_samples import KINDS, SHAPES, fragments, whole, write_checkpoint
from safetensors.numpy import load_file

from megatrain.checkpoint.manifest import FileEntry, read_manifest
from megatrain.checkpoint.rank_file import BLOCK_BYTES, RankFile, read_written, write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.distributed.fragment import FlatShard, Fragment, ShardSpec, TensorSlice
from megatrain.errors import CheckpointError


def _read_independently(folder: Path) -> dict[tuple[str, str], np.ndarray[Any, Any]]:
    """All tensors of a checkpoint by safetensors, json and NumPy alone, as anyone could from the format's text."""
    names = [entry["file"] for entry in json.loads((folder / "manifest.json").read_text())["files"]]
    tensors: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        content = (folder / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        data = load_file(folder / name)
        for key, (tensor, kind, shape, offset, extent, start) in json.loads(header["__metadata__"]["pieces"]).items():
            target = tensors.setdefault((tensor, kind), np.full(shape, np.nan, dtype=data[key].dtype))
            part = target[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
            flat = part.reshape(-1).copy()
            flat[start : start + len(data[key])] = data[key]
            part[...] = flat.reshape(extent)
    return tensors


def test_plain_safetensors_reads_a_checkpoint(tmp_path: Path) -> None:
    tensors = _read_independently(write_checkpoint(tmp_path, 3))
    assert tensors.keys() == {(name, kind) for name in SHAPES for kind in KINDS}
    for (name, kind), values in tensors.items():
        assert np.array_equal(values, whole(name, kind).numpy())


@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_any_slice_is_read_whoever_wrote_it(num_ranks: int, tmp_path: Path) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path, 1, num_ranks))
    expected = whole("layer.weight", "exp_avg")
    rows = TensorSlice((12, 0), (24, 16))
    columns = TensorSlice((0, 4), (48, 8))
    for part, values in ((rows, expected[12:36]), (columns, expected[:, 4:12])):
        wanted = FlatShard("layer.weight", (48, 16), part, 5, 100)
        assert torch.equal(reader.read(wanted, "exp_avg"), values.reshape(-1)[5:105])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_element_type_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(1000).to(dtype)
    piece = FlatShard("x", (1000,), TensorSlice((0,), (1000,)), 0, 1000)
    file = RankFile(tmp_path, write_rank_file(tmp_path / "a.safetensors", [Fragment(piece, "weight", values)]))
    read = torch.from_numpy(file.read(file.shards[0]).copy()).view(dtype)
    assert torch.equal(read, values)


def test_each_block_of_a_file_is_checked(tmp_path: Path) -> None:
    numel = (2 * BLOCK_BYTES + 4096) // 4
    piece = FlatShard("x", (numel,), TensorSlice((0,), (numel,)), 0, numel)
    path = tmp_path / "a.safetensors"
    written = write_rank_file(path, [Fragment(piece, "weight", torch.arange(numel, dtype=torch.float32))])
    assert read_written(path) == written
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(header_bytes + BLOCK_BYTES + 123)
        file.write(b"\xff")
    damaged = RankFile(tmp_path, written)
    damaged.check(0, BLOCK_BYTES)
    first, last = header_bytes + BLOCK_BYTES, header_bytes + 2 * BLOCK_BYTES
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: bytes {first} to {last} are not what was written"):
        damaged.check()


def test_two_boxes_of_one_tensor_are_two_pieces(tmp_path: Path) -> None:
    """A fused query-key-value weight on a tensor rank: the ranges within the slices are the same."""
    slices = [TensorSlice((0, 2 * part), (4, 1)) for part in range(3)]
    parts = [
        Fragment(FlatShard("qkv", (4, 6), part, 0, 4), "weight", torch.full((4,), i)) for i, part in enumerate(slices)
    ]
    parts = [part._replace(data=part.data.float()) for part in parts]
    file = RankFile(tmp_path, write_rank_file(tmp_path / "a.safetensors", parts))
    assert [file.read(stored)[0] for stored in file.shards] == [0.0, 1.0, 2.0]


def _forge(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> FileEntry:
    """Rewrite the header, and give the checksum that a forged manifest would have."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    table = json.loads(header["__metadata__"]["pieces"])
    change(header, table)
    header["__metadata__"]["pieces"] = json.dumps(table)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + header_bytes :])
    return read_written(path)


def _first(table: dict[str, Any]) -> list[Any]:
    found: list[Any] = next(iter(table.values()))
    return found


FORGERIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "a range outside of the file": lambda header, _: header["norm.weight:weight:4"].update(data_offsets=[0, 1 << 60]),
    "overlapping ranges": lambda header, _: header["norm.weight:weight:4"].update(data_offsets=[0, 32]),
    "a negative range": lambda header, _: header["norm.weight:weight:4"].update(data_offsets=[64, 32]),
    "a fraction for an offset": lambda header, _: header["embed.weight:weight:0"].update(data_offsets=[0.0, 9600.0]),
    "half an element": lambda header, _: header["embed.weight:weight:0"].update(data_offsets=[0, 9598]),
    "a slice outside of the tensor": lambda _, table: _first(table).__setitem__(3, [299, 0]),
    "a slice of another rank": lambda _, table: _first(table).__setitem__(4, [300, 16, 1]),
    "an empty part": lambda _, table: _first(table).__setitem__(4, [0, 16]),
    "a start beyond the slice": lambda _, table: _first(table).__setitem__(5, 4799),
    "a negative start": lambda _, table: _first(table).__setitem__(5, -1),
    "true for a start": lambda _, table: _first(table).__setitem__(5, True),
    "text for a shape": lambda _, table: _first(table).__setitem__(2, "300"),
    "an unknown element type": lambda header, _: header["embed.weight:weight:0"].update(dtype="PICKLE"),
    "a piece that has no data": lambda header, _: header.pop("embed.weight:weight:0") and None,
    "a list for a piece": lambda header, _: header.update({"embed.weight:weight:0": []}),
    "no block table": lambda header, _: header.pop("__blocks__") and None,
    "another format": lambda header, _: header["__metadata__"].update(format="pt"),
    "no pieces": lambda _, table: table.clear(),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_header_with_right_checksum_is_refused(forgery: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_rank_file(path, fragments(0, 2))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        RankFile(tmp_path, _forge(path, FORGERIES[forgery]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"{}" + bytes(64),
        (60_000).to_bytes(8, "little") + b"[" * 60_000 + bytes(16),
        pickle.dumps({"weights": [1.0] * 100}),
    ],
    ids=["empty", "7 bytes", "zeros", "huge header", "largest header", "no table", "deep nesting", "a pickle"],
)
def test_foreign_files_are_refused_in_bounded_memory(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        written = read_written(path)  # what a forged manifest would say
    except CheckpointError:
        checksum = xxhash.xxh3_128(content).hexdigest()
        written = FileEntry(file=path.name, bytes=len(content), checksum=checksum)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        RankFile(tmp_path, written)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_a_file_truncated_during_reading_is_named(tmp_path: Path) -> None:
    file = RankFile(tmp_path, write_rank_file(tmp_path / "a.safetensors", fragments(0, 1)))
    os.truncate(tmp_path / "a.safetensors", 4096)  # a map of it that is touched beyond is SIGBUS, as at an I/O error
    with pytest.raises(CheckpointError, match=r"a\.safetensors: bytes .* cannot be read \(the file has become shorter"):
        file.check()


def test_a_planted_pickle_is_found_and_never_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / "rank-00001.safetensors").write_bytes(pickle.dumps(_Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors"):
        CheckpointReader(folder).read_parameter(ShardSpec.whole("embed.weight", (300, 16)), "weight")
    assert not (tmp_path / "ran").exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(16,\) there and \(32,\)"):
        reader.read_parameter(ShardSpec.whole("norm.weight", (32,)), "weight")


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"16 of 16 elements of bias \(weight\)"):
        reader.read_parameter(ShardSpec.whole("bias", (16,)), "weight")


def test_the_manifest_lists_every_file_with_its_size(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    entries = read_manifest(folder).files
    assert {entry.file for entry in entries} | {"manifest.json"} == {path.name for path in folder.iterdir()}
    assert all((folder / entry.file).stat().st_size == entry.bytes for entry in entries)

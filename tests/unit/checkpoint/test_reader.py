"""Reading pieces, whoever wrote them: no more files than needed, no element twice or never."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from checkpoint_samples import SHAPES, fragments, manifest, whole, write_checkpoint

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.manifest import FileEntry
from megatrain.checkpoint.rank_file import rank_file_name, write_rank_file
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import PosixStore
from megatrain.distributed.fragment import FlatShard, Fragment, ShardSpec, TensorSlice
from megatrain.errors import CheckpointError


@contextmanager
def _descriptors_left(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_reading_stays_below_the_open_file_limit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, num_ranks=100)
    with _descriptors_left(40):
        reader = CheckpointReader(folder)
        for name, shape in SHAPES.items():
            for kind in ("weight", "exp_avg"):
                assert reader.read_parameter(ShardSpec.whole(name, shape), kind).equal(whole(name, kind))
        assert verify(folder)[0] == []


def test_a_changed_layout_opens_only_neighbouring_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, num_ranks=64)
    for rank in {*range(64)} - {*range(18, 26)}:  # the sixth of 16 ranks needs the files from 20 on to 23
        path = folder / rank_file_name(rank)
        path.write_bytes(bytes(path.stat().st_size))
    reader = CheckpointReader(folder, near=(5, 16))
    for fragment in fragments(5, 16):
        if fragment.shard.name != "norm.weight":  # of fewer elements than ranks: the first 16 files have it
            assert reader.read(fragment.shard, fragment.kind).equal(fragment.data)


def _save(run_dir: Path, files: list[list[Fragment]]) -> Path:
    """A checkpoint whose files hold what they are told to."""
    store = PosixStore(run_dir / "checkpoints")
    store.open_generation()
    folder = store.begin(1)
    written = [write_rank_file(folder / rank_file_name(rank), pieces) for rank, pieces in enumerate(files)]
    return store.commit(manifest(1, [FileEntry(file=w.file, bytes=w.bytes, checksum=w.checksum) for w in written]))


def _rows(first: int, count: int) -> Fragment:
    """Rows of norm.weight, in a slice of their own."""
    piece = FlatShard("norm.weight", (16,), TensorSlice((first,), (count,)), 0, count)
    return Fragment(piece, "weight", whole("norm.weight", "weight")[first : first + count])


REPEATED: dict[str, Callable[[], list[Fragment]]] = {
    "the same piece": lambda: [_rows(0, 8), _rows(0, 8)],
    "slices that overlap": lambda: [_rows(0, 8), _rows(4, 8)],
    "ranges that overlap": lambda: [
        Fragment(FlatShard("norm.weight", (16,), TensorSlice((0,), (16,)), start, 8), "weight", torch.ones(8))
        for start in (4, 0)
    ],
}


@pytest.mark.parametrize("apart", [False, True], ids=["in one file", "in two files"])
@pytest.mark.parametrize("case", REPEATED)
def test_elements_held_twice_hide_no_missing_ones(case: str, apart: bool, tmp_path: Path) -> None:
    pieces = REPEATED[case]()
    folder = _save(tmp_path, [[piece] for piece in pieces] if apart else [pieces])
    with pytest.raises(
        CheckpointError, match=r"safetensors: it holds elements of norm\.weight \(weight\) that another"
    ):
        CheckpointReader(folder).read(FlatShard("norm.weight", (16,), TensorSlice((0,), (16,)), 0, 16), "weight")
    assert any("that another shard holds too" in problem for problem in verify(folder)[0])


def test_verify_finds_a_tensor_without_a_file(tmp_path: Path) -> None:
    held = [fragment for fragment in fragments(0, 1) if fragment.shard.name != "norm.weight"]
    folder = _save(tmp_path, [held])
    assert verify(folder)[0] == [f"{folder}: its files hold 5,568 parameters instead of 5,584."]


def test_verify_finds_elements_without_a_file(tmp_path: Path) -> None:
    folder = _save(tmp_path, [[f for f in fragments(0, 1) if f.shard.name != "norm.weight"], [_rows(0, 8)]])
    assert verify(folder)[0] == [f"{folder}: norm.weight (weight) has 8 elements on disk instead of 16."]


def test_verify_refuses_an_impossible_shape(tmp_path: Path) -> None:
    huge = FlatShard("norm.weight", (2**63 + 5, 2**63), TensorSlice((0, 0), (4, 4)), 0, 16)
    folder = _save(tmp_path, [[Fragment(huge, "weight", torch.ones(16))]])
    assert "norm.weight (weight) has 16 elements on disk" in verify(folder)[0][0]

"""A rank's part in saving: copies of its own, and what becomes of a save that fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_samples import fragments, manifest
from upath import UPath

from megatrain.checkpoint.location import locate
from megatrain.checkpoint.object_store import ObjectStore
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saver import CheckpointSaver, SaveResult
from megatrain.checkpoint.store import PosixStore, Retention, find_problem
from megatrain.distributed.bootstrap import free_port
from megatrain.distributed.fragment import Fragment, ShardSpec, TensorSlice, shard_views
from megatrain.errors import CheckpointError, Unreachable


def _save(saver: CheckpointSaver, step: int, pieces: Iterable[Fragment]) -> SaveResult:
    saver.begin(step, pieces, partial(manifest, step))
    outcome = None
    while saver.is_saving:
        outcome = saver.advance(saver.status(wait=True))
    assert outcome is not None
    return outcome


def test_an_uncreatable_folder_fails_only_that_save(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    in_the_way = tmp_path / store.open_generation() / "step-00000001"
    in_the_way.touch()
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())
    assert _save(saver, 1, fragments(0, 1)).path is None
    assert str(saver.error) == f"{in_the_way}: File exists"
    assert _save(saver, 2, fragments(0, 1)).path == tmp_path / "step-00000002"
    saver.close()


def test_state_refused_during_copying_fails_only_that_save(tmp_path: Path) -> None:
    def refused() -> Iterator[Fragment]:
        yield from fragments(0, 1)
        raise CheckpointError("not that parameter")

    store = PosixStore(tmp_path)
    store.open_generation()
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())
    assert _save(saver, 1, refused()).path is None
    assert str(saver.error) == "not that parameter"
    assert store.list() == []
    assert _save(saver, 2, fragments(0, 1)).path == tmp_path / "step-00000002"
    saver.close()


def test_an_unreachable_store_fails_only_that_save(tmp_path: Path) -> None:
    at_once = {"retries": {"max_attempts": 0}}
    address = f"http://127.0.0.1:{free_port()}"
    nowhere = UPath("s3://bucket/run", endpoint_url=address, key="a", secret="b", config_kwargs=at_once)
    store = ObjectStore(nowhere)
    store.join("g00001-0badcafe")
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())
    assert _save(saver, 1, fragments(0, 1)).path is None
    path = "s3://bucket/run/step-00000001.g00001-0badcafe/rank-00000.safetensors"
    assert str(saver.error).startswith(f"{path}: Could not")
    saver.close()
    with pytest.raises(Unreachable, match="s3://bucket/run/generations: Could not connect"):
        store.list()
    with pytest.raises(Unreachable, match=r"0badcafe: Could not connect"):  # which is no damage
        find_problem(nowhere / "step-00000001.g00001-0badcafe")


def test_pieces_differing_only_in_box_stay_apart(tmp_path: Path) -> None:
    # A fused query-key-value weight split over tensor ranks has three such pieces.
    shape = (4, 12)
    whole = torch.arange(48.0).view(shape)
    slices = tuple(TensorSlice((0, first), (4, 2)) for first in (0, 4, 8))
    spec = ShardSpec("c_attn.weight", shape, slices, dim=1)
    local = torch.cat([whole[:, part.offset[1] : part.offset[1] + 2] for part in slices], 1).flatten()
    pieces = [
        Fragment(piece, "weight", local[torch.from_numpy(where)])  # type: ignore[arg-type]
        for piece, where in shard_views(spec, 0, local.numel())
    ]
    store = PosixStore(tmp_path)
    store.open_generation()
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())
    saver.prepare(pieces)
    for _ in range(2):  # both times into the memory that was prepared
        store.set_aside(0)
        outcome = _save(saver, 1, pieces)
    saver.close()
    assert outcome.path is not None
    read = CheckpointReader(outcome.path).read_parameter(spec, "weight")
    assert torch.equal(read.flatten(), local)


def test_state_with_nan_or_infinity_is_never_saved(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.open_generation()
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())
    _save(saver, 1, fragments(0, 1))
    for step, value in ((2, math.nan), (3, -math.inf)):
        ruined = fragments(0, 1)
        ruined[3].data[-1] = value
        assert _save(saver, step, ruined).path is None
        assert str(saver.error) == f"{ruined[3].shard.name} (exp_avg) has NaN or infinity in it"
    saver.close()
    assert [found.step for found in store.list()] == [1]


def test_a_store_without_its_libraries_is_reported() -> None:
    """hdfs:// without Java, or without that cluster."""
    with pytest.raises(Unreachable, match=r"hdfs://nn\.invalid/run: this machine does not get to that store"):
        locate("hdfs://nn.invalid/run")

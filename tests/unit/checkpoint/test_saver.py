"""Two ranks' savers in one process; their votes are summed here as a collective would sum them."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoint_samples import KINDS, SHAPES, fragments, manifest, whole

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saver import CheckpointSaver, Outcome, Votes
from megatrain.checkpoint.store import CheckpointStore
from megatrain.distributed.fragment import Box, Fragment, Piece, Placement


def _savers(run_dir: Path, num_ranks: int = 2) -> list[CheckpointSaver]:
    return [CheckpointSaver(CheckpointStore(run_dir), rank, num_ranks, keep=2) for rank in range(num_ranks)]


def _begin(savers: list[CheckpointSaver], step: int) -> None:
    for rank, saver in enumerate(savers):
        saver.begin(
            step, fragments(rank, len(savers)), lambda files: manifest(step, files), [("tokenizer.json", b"{}")]
        )


def _finish(savers: list[CheckpointSaver]) -> list[Outcome]:
    ended: list[Outcome] = []
    while savers[0].is_busy:
        total = Votes(*map(sum, zip(*(saver.votes(wait=True) for saver in savers), strict=True)))
        ended = [outcome for saver in savers if (outcome := saver.settle(total))]
    return ended


def test_a_save_appears_once_all_ranks_have_written(tmp_path: Path) -> None:
    savers = _savers(tmp_path)
    _begin(savers, 7)
    assert CheckpointStore(tmp_path).list() == []
    ended = _finish(savers)
    assert [outcome.path for outcome in ended] == [CheckpointStore(tmp_path).finished(7)] * 2
    assert verify(CheckpointStore(tmp_path).finished(7))[0] == []
    reader = CheckpointReader(CheckpointStore(tmp_path).finished(7))
    for name, shape in SHAPES.items():
        for kind in KINDS:
            assert torch.equal(reader.read_parameter(Placement.whole(name, shape), kind), whole(name, kind))


def test_what_is_saved_is_the_state_at_the_call_though_training_goes_on(tmp_path: Path) -> None:
    (saver,) = _savers(tmp_path, num_ranks=1)
    live = torch.ones(1 << 20)
    piece = Piece("x", (1 << 20,), Box((0,), (1 << 20,)), 0, 1 << 20)
    for step in (1, 2):
        live.fill_(float(step))
        saver.begin(step, [Fragment(piece, "weight", live)], lambda files, step=step: manifest(step, files))  # type: ignore[misc]
        live.fill_(-1.0)
        _finish([saver])
        read = CheckpointReader(CheckpointStore(tmp_path).finished(step)).read(piece, "weight")
        assert read.unique().tolist() == [float(step)]


def test_boxes_of_one_tensor_do_not_share_a_copy(tmp_path: Path) -> None:
    (saver,) = _savers(tmp_path, num_ranks=1)
    pieces = [Piece("qkv", (4, 6), Box((0, 2 * part), (4, 2)), 0, 8) for part in range(3)]
    parts = [Fragment(piece, "weight", torch.full((8,), float(i))) for i, piece in enumerate(pieces)]
    saver.begin(1, parts, lambda files: manifest(1, files))
    _finish([saver])
    read = CheckpointReader(CheckpointStore(tmp_path).finished(1)).read_parameter(
        Placement.whole("qkv", (4, 6)), "weight"
    )
    assert read[0].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_where_one_rank_cannot_write_no_checkpoint_appears_and_the_next_save_does(tmp_path: Path) -> None:
    savers = _savers(tmp_path)
    in_the_way = CheckpointStore(tmp_path).begin(3) / "rank-00001.safetensors"
    in_the_way.mkdir()
    _begin(savers, 3)
    ended = _finish(savers)
    assert [outcome.path for outcome in ended] == [None, None]
    assert savers[1].problem == f"{in_the_way}: File exists"
    assert not in_the_way.exists()  # rank 0 has cleared away what the failed save had written
    _begin(savers, 4)
    assert all(outcome.path is not None for outcome in _finish(savers))
    assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path).list()] == [4]


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    savers = _savers(tmp_path)
    for step in (1, 2, 3, 4):
        _begin(savers, step)
        _finish(savers)
    assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path).list()] == [3, 4]

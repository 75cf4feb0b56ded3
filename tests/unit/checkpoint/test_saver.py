"""Saving copies each piece into memory of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saver import CheckpointSaver
from megatrain.checkpoint.store import PosixStore, Retention
from megatrain.distributed.fragment import Box, Fragment, Placement, windows


def test_pieces_that_differ_in_their_box_alone_are_not_confused(tmp_path: Path) -> None:
    # A fused query-key-value weight split over tensor ranks has three such pieces.
    shape = (4, 12)
    whole = torch.arange(48.0).view(shape)
    boxes = tuple(Box((0, first), (4, 2)) for first in (0, 4, 8))
    placement = Placement("c_attn.weight", shape, boxes, dim=1)
    local = torch.cat([whole[:, box.offset[1] : box.offset[1] + 2] for box in boxes], 1).flatten()
    fragments = [
        Fragment(piece, "weight", local[torch.from_numpy(where)])  # type: ignore[arg-type]
        for piece, where in windows(placement, 0, local.numel())
    ]
    store = PosixStore(tmp_path)
    store.open_generation()
    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention())

    def manifest(files: object) -> Manifest:
        return Manifest(
            step=1,
            tokens=1,
            parameters=1,
            layout={},
            state={},
            config={},
            versions={},
            created="",
            files=tuple(files),  # type: ignore[arg-type]
        )

    saver.prepare(fragments)
    for _ in range(2):  # both times into the memory that was prepared
        store.set_aside(0)
        saver.begin(1, fragments, manifest)
        while saver.is_busy:
            outcome = saver.settle(saver.votes(wait=True))
    saver.close()
    assert outcome is not None
    assert outcome.path is not None
    read = CheckpointReader(outcome.path).read_parameter(placement, "weight")
    assert torch.equal(read.flatten(), local)

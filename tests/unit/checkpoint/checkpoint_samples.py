"""A small checkpoint written by the real parts, without a trainer."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import FileEntry, Manifest
from megatrain.checkpoint.rank_file import rank_file_name, write_rank_file
from megatrain.checkpoint.store import CheckpointStore, PosixStore, add_file
from megatrain.distributed.fragment import Fragment, ShardSpec, shard_views

SHAPES = {"embed.weight": (300, 16), "layer.weight": (48, 16), "norm.weight": (16,)}
KINDS = ("weight", "exp_avg")


def whole(name: str, kind: str) -> torch.Tensor:
    """The values of a tensor of the sample."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {kind}".encode()))
    return torch.randn(SHAPES[name], generator=generator)


def fragments(rank: int, num_ranks: int) -> list[Fragment]:
    """What a rank holds: its share of each flattened tensor."""
    found = []
    for name, shape in SHAPES.items():
        spec = ShardSpec.whole(name, shape)
        share = -(-spec.local_numel // num_ranks)
        start, stop = rank * share, min((rank + 1) * share, spec.local_numel)
        for piece, _ in shard_views(spec, start, stop):
            found += [Fragment(piece, kind, whole(name, kind).view(-1)[start:stop]) for kind in KINDS]
    return found


def manifest(step: int, files: Sequence[FileEntry]) -> Manifest:
    """A manifest of the sample."""
    return Manifest(
        step=step,
        tokens=step * 100,
        parameters=sum(math.prod(shape) for shape in SHAPES.values()),
        layout={"world_size": 2},
        state={"updates": step},
        config={"model": {"hidden_size": 16}},
        versions={"megatrain": "0"},
        created="2030-01-01T00:00:00+00:00",
        files=tuple(files),
    )


def write_checkpoint(run_dir: Path, step: int, num_ranks: int = 2, **facts: Any) -> Path:
    """A whole checkpoint of the sample in a run folder, with a plain file beside the rank files."""
    path = save(PosixStore(run_dir / "checkpoints"), step, num_ranks, **facts)
    assert isinstance(path, Path)
    return path


def save(store: CheckpointStore, step: int, num_ranks: int = 2, **facts: Any) -> Location:
    """The same in a store. ``facts``: further keys of its manifest."""
    if not store.generation:
        store.open_generation()
    folder = store.begin(step)
    entries = [write_rank_file(folder / rank_file_name(rank), fragments(rank, num_ranks)) for rank in range(num_ranks)]
    entries.append(add_file(folder, "tokenizer.json", b'{"model": {}}' * 20))
    return store.commit(manifest(step, entries).model_copy(update=facts))

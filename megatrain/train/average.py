"""The mean of the weights of a run's last checkpoints (Vaswani et al. 2017, section 6.1), as one more checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from megatrain.checkpoint.location import Location, new_folder, refuse_existing
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import find_store
from megatrain.distributed.fragment import WEIGHT, FlatShard, Fragment, TensorSlice
from megatrain.errors import CheckpointError
from megatrain.inference.assets import Assets
from megatrain.plan.flops import parameter_shapes
from megatrain.train.convert import write_checkpoint

FILE_ELEMENTS = 1 << 27
"""Of a file that is written: what is in memory at a time, however large the model is."""


def average_checkpoints(run: Location, last: int, out: Path, file_elements: int = FILE_ELEMENTS) -> list[int]:
    """Make the checkpoint ``out`` of the mean weights of a run's ``last`` good checkpoints; their steps.

    It is used as an imported one is: it has no optimizer state. The sums are in double precision, so that equal weights
    stay as they are. Raises ConfigError where ``out`` exists, CheckpointError where there are fewer checkpoints, or
    they hold adapters.
    """
    refuse_existing(out)
    good = [found.path for found in find_store(run).list() if found.good]
    if len(good) < last:
        raise CheckpointError(
            f"{run} has {len(good)} good checkpoint(s), and --last asks for {last}: ask for fewer, or let a run keep "
            "more of them (checkpoint.keep, checkpoint.every_steps)."
        )
    readers = [CheckpointReader(folder) for folder in good[-last:]]
    newest = readers[-1]
    if newest.manifest.base is not None:
        raise CheckpointError(
            f"{newest.folder} holds LoRA adapters, and the product of their means is not the mean of their products: "
            "average a run of whole weights."
        )
    assets, steps = Assets.of_checkpoint(newest), [reader.manifest.step for reader in readers]
    config = newest.manifest.config
    manifest = newest.manifest.model_copy(
        update={
            "layout": {"world_size": 1, "averaged": last},
            "state": {},
            "config": {**config, "optimizer": {**config.get("optimizer", {}), "ema_decay": None}},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "validation_loss": None,
            "on_request": False,
        }
    )
    batches = _batches(parameter_shapes(newest.saved.model), file_elements)
    means = ([Fragment(shard, WEIGHT, _mean(readers, shard)) for shard in batch] for batch in batches)
    with new_folder(out, "averaged") as unfinished:
        write_checkpoint(unfinished, manifest, means, assets)
    return steps


def _mean(readers: Sequence[CheckpointReader], shard: FlatShard) -> torch.Tensor:
    total = torch.zeros(shard.length, dtype=torch.float64)
    for reader in readers:
        total += reader.read(shard, WEIGHT)
    return total.div_(len(readers)).float()


def _batches(shapes: Mapping[str, Sequence[int]], num_elements: int) -> Iterator[list[FlatShard]]:
    """Every element of every parameter, in shards of ``num_elements`` together."""
    batch: list[FlatShard] = []
    room = num_elements
    for name, shape in shapes.items():
        whole = TensorSlice((0,) * len(shape), tuple(shape))
        start, size = 0, math.prod(shape)
        while start < size:
            length = min(room, size - start)
            batch.append(FlatShard(name, tuple(shape), whole, start, length))
            start, room = start + length, room - length
            if not room:
                yield batch
                batch, room = [], num_elements
    if batch:
        yield batch

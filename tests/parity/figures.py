"""What a layout computed, and how it compares with what one rank did."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatrain.checkpoint.rank_file import RankFile, copy_into, read_written
from megatrain.distributed.fragment import FlatShard, TensorSlice
from tests.parity.matrix import DATA_OF, parity_config
from tests.parity.ranks import Ranks
from tests.runs import TinyData

# Adam turns a gradient that is zero but for rounding into a full step. So it is with the bias of attention's keys,
# which adds the same to all logits of a query: softmax does not see it.
KEY_BIASES = re.compile(
    r"attn\.c_attn\.bias$|attention\.(self|attention)\.key\.bias$|^model\.(en|de)coder\..*attn\.k_proj\.bias$"
)
NUM_STEPS = 8  # two of warm-up, and six in which a difference would grow


@dataclass
class Figures:
    """Of each step, loss and gradient norm; at the end the validation loss and the gathered weights."""

    losses: list[float]
    norms: list[float]
    validation: float
    weights: dict[str, torch.Tensor]

    def assert_equals(
        self, other: Figures, *, loss: float = 1e-4, norm: float = 1e-3, weight: float | None = 1e-4
    ) -> None:
        """Losses within ``loss``, gradient norms and weights (each parameter as a whole) relative to the other's."""
        assert max(map(abs, np.subtract(self.losses, other.losses))) < loss, (self.losses, other.losses)
        assert np.abs(np.divide(self.norms, other.norms) - 1).max() < norm, (self.norms, other.norms)
        assert abs(self.validation - other.validation) < loss, (self.validation, other.validation)
        if weight is not None:
            far = {name: d for name, d in self.distances(other).items() if not d < weight}
            assert not far, f"weights differ by more than {weight}: {far}"

    def assert_is(self, other: Figures) -> None:
        """All equal to the last bit."""
        assert self.losses == other.losses
        assert self.norms == other.norms
        assert self.validation == other.validation
        assert self.weights.keys() == other.weights.keys()
        assert [name for name, weight in self.weights.items() if not torch.equal(weight, other.weights[name])] == []

    def distances(self, other: Figures) -> dict[str, float]:
        """Of each parameter, the norm of the difference over the other's norm."""
        assert self.weights.keys() == other.weights.keys()
        return {
            name: float((_seen(name, weight) - (ours := _seen(name, other.weights[name]))).norm() / ours.norm())
            for name, weight in self.weights.items()
        }


class Pool:
    """Ranks in every number, started when they are first asked for, and what one rank computed of each config."""

    def __init__(self, data: TinyData, folder: Path, further_data: Callable[[str], TinyData]) -> None:
        self.data = data
        self._further_data = further_data
        self._folder = folder
        self._ranks: dict[int, Ranks] = {}
        self._alone: dict[str, Figures] = {}

    def config(self, model: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
        """A ``parity_config`` on data that suits the model."""
        data = self._further_data(DATA_OF[model]) if model in DATA_OF else self.data
        return parity_config(data, model, **{"run": {"dir": str(self._folder / "run")}, **sections})

    def train(self, world_size: int, config: dict[str, Any], num_steps: int = NUM_STEPS, **how: Any) -> Figures:
        """Train on so many ranks. ``how``: ``gpu_kernels`` or ``backend``, as in ``worker.Case``."""
        folder = self._folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        case = {"config": config, "num_steps": num_steps, "save": str(folder), **how}
        answer = self.answer(world_size, case)
        weights = {name: tensor for (name, kind), tensor in gather_state(folder).items() if kind == "weight"}
        return Figures(answer["losses"], answer["norms"], answer["validation"], weights)

    def answer(self, world_size: int, case: dict[str, Any]) -> dict[str, Any]:
        """What so many ranks say of a case (``worker.Case``)."""
        return self._ranks.setdefault(world_size, Ranks(world_size)).train(case)

    def alone(self, model: str, num_steps: int = NUM_STEPS, /, **sections: dict[str, Any]) -> Figures:
        """What one rank computes, without ZeRO and recomputation, in one micro-batch."""
        train = {"micro_batch_size": 8, **sections.pop("train", {})}
        config = self.config(model, parallel={"zero_stage": 0}, train=train, **sections)
        key = json.dumps([config, num_steps], sort_keys=True)
        if key not in self._alone:
            self._alone[key] = self.train(1, config, num_steps)
        return self._alone[key]

    def stop(self) -> None:
        """End all ranks."""
        for ranks in self._ranks.values():
            ranks.stop()


def gather_state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Whole tensors, flat, by name and kind, from the files of all ranks; every element must be there exactly once."""
    state: dict[tuple[str, str], torch.Tensor] = {}
    missing: dict[tuple[str, str], int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = RankFile(folder, read_written(path))
        for stored in file.shards:
            name, shape = stored.shard.name, stored.shard.global_shape
            key, count = (name, stored.kind), math.prod(shape)
            flat = state.setdefault(key, torch.full((count,), math.nan))
            whole = FlatShard(name, shape, TensorSlice((0,) * len(shape), shape), 0, count)
            missing[key] = missing.get(key, count) - copy_into(flat, whole, file, stored)
    wrong = {key: number for key, number in missing.items() if number}
    assert not wrong, f"elements missing (or saved more than once, where negative): {wrong}"
    assert all(flat.isfinite().all() for flat in state.values())
    return state


def _seen(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that the loss depends on."""
    if not KEY_BIASES.search(name):
        return weight
    if not name.endswith("c_attn.bias"):  # none of it
        return torch.ones(1)
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])

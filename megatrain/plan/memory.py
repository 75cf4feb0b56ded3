"""What each distinct kind of rank holds in memory, in bytes: what stays, what a pass keeps, what comes and goes.

Weights, gradients and optimizer are what the engine really allocates here, to the byte;
tests/unit/plan/test_rank_memory.py holds them against both engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.plan.activations import activations, working_set
from megatrain.plan.deepspeed_memory import deepspeed_memory
from megatrain.plan.engine_memory import weight_state_bytes
from megatrain.plan.fsdp2_memory import fsdp2_memory
from megatrain.plan.stage_model import StageModel

_RECORDS_IN_FLIGHT = 6
"""Between stages, of activations or gradients: two exchanges of two may be unfinished, and two have come in."""


@dataclass(frozen=True)
class RankMemory:
    """The memory of one kind of rank, in bytes.

    ``rank``: the first of the ``num_ranks`` of pipeline stage ``stage``. ``parameters``: elements it computes with.
    ``passes`` and ``update``: buffers of the device that come and go, those of forward and backward passes, and those
    of the update, when activations are gone. ``cpu``: in the memory of its node.
    """

    rank: int
    num_ranks: int
    stage: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    passes: Mapping[str, int]
    update: Mapping[str, int]
    cpu: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time, with the buffers."""
        resident = self.total_bytes - self.activations_bytes
        return resident + max(self.activations_bytes + sum(self.passes.values()), sum(self.update.values()))

    def to_json(self) -> dict[str, Any]:
        shown = {key: value for key, value in vars(self).items() if key not in ("passes", "update", "cpu")}
        return {
            **shown,
            "total_bytes": self.total_bytes,
            "peak_bytes": self.peak_bytes,
            "buffers_bytes": {"passes": dict(self.passes), "update": dict(self.update)},
            "cpu_bytes": dict(self.cpu),
        }


def rank_memory(part: StageModel) -> RankMemory:
    held = {"deepspeed": deepspeed_memory, "fsdp2": fsdp2_memory}[part.config.parallel.engine](part)
    num_ranks = part.data * part.config.parallel.tensor
    return RankMemory(
        rank=part.stage * num_ranks,
        num_ranks=num_ranks,
        stage=part.stage,
        parameters=part.num_parameters,
        weights_bytes=held.weights,
        gradients_bytes=held.gradients,
        optimizer_bytes=held.optimizer,
        activations_bytes=activations(part),
        passes=_present({**working_set(part), **held.passes, "sent and received": _in_messages(part)}),
        update=_present(held.update),
        cpu={"checkpoint copy": weight_state_bytes(part.config) * held.owned, **held.cpu},
    )


def _in_messages(part: StageModel) -> int:
    """Between stages."""
    if part.config.parallel.pipeline == 1:
        return 0
    return _RECORDS_IN_FLIGHT * part.border_bytes


def _present(buffers: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in buffers.items() if size}

"""What an engine holds on a rank, whichever it is: the record that `deepspeed_memory` and `fsdp2_memory` give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megatrain.config import RunConfig
from megatrain.plan.stage_model import Parameter, StageModel, share

STEP_BYTES = 4
"""torch's AdamW counts the steps of each of its tensors in one of fp32."""


class EngineMemory(NamedTuple):
    """Bytes of a rank's device between two passes, and ``owned``, the elements that it saves at the most.

    ``passes`` and ``update``: buffers that come and go, those of forward and backward passes, and those of the update.
    ``cpu``: in the memory of its node.
    """

    weights: int
    gradients: int
    optimizer: int
    owned: int
    passes: Mapping[str, int]
    update: Mapping[str, int]
    cpu: Mapping[str, int]


def weight_state_bytes(config: RunConfig) -> int:
    """Of a weight: its master, running mean and running square, and where it is kept, its average."""
    return 4 * (3 if config.optimizer.ema_decay is None else 4)


def saved_elements(part: StageModel, held: Callable[[Parameter], int], ranks: int = 1) -> int:
    """The most elements that one of ``ranks`` that hold the same saves, of ``held`` elements of each parameter.

    What tensor ranks hold alike is shared out among them too; tied copies and frozen weights are not saved.
    """
    return sum(share(held(p), p.num_replicas * ranks) * p.copies for p in part.updated)

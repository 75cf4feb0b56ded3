"""What the sources have in common whose samples a packing plan decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatrain.data.dataset import Dataset
from megatrain.data.order import Samples
from megatrain.data.packing import PackingPlan


@dataclass(frozen=True)
class PlannedSource:
    """A dataset packed into samples by a plan. What a sample has free is filled, and not scored."""

    dataset: Dataset
    plan: PackingPlan
    all_scored: bool = field(default=False, init=False)

    @property
    def seq_len(self) -> int:
        return self.plan.seq_len

    @property
    def num_samples(self) -> int:
        return self.plan.num_samples

    @property
    def left_out(self) -> str | None:
        return self.plan.dropped.text(self.seq_len) if self.plan.dropped.tokens else None

    def num_targets(self, samples: Samples) -> int:
        return int(self.plan.num_targets(samples.index).sum())

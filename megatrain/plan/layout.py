"""The numbers that decide whether a layout is legal, and which key of the config each of them is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatrain.config import RunConfig

Value = int | str | bool

OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True)
class Layout:
    """A config on a number of ranks, as far as the rules look at it. Batch sizes count sequences."""

    world_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    seq_len: int
    max_seq_len: int
    tensor: int
    pipeline: int
    zero_stage: int
    sequence: bool
    offload: str
    global_batch: int
    micro_batch: int

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model is divided over."""
        return self.tensor * self.pipeline

    @property
    def data(self) -> int | None:
        """The data degree; None where the ranks do not divide."""
        return None if self.world_size % self.model_ranks else self.world_size // self.model_ranks

    def having(self, field: str, value: Value) -> Layout:
        """The same layout with another value in one field."""
        changed: dict[str, Any] = {field: value}
        return replace(self, **changed)


# What a user may change to make a layout legal: the Layout's field and the config's key.
KEYS = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "zero_stage": "parallel.zero_stage",
    "sequence": "parallel.sequence",
    "offload": "parallel.offload",
    "global_batch": "train.global_batch_size",
    "micro_batch": "train.micro_batch_size",
    "seq_len": "data.seq_len",
}


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The config's layout on `world_size` ranks, legal or not."""
    model, parallel, train = config.model, config.parallel, config.train
    return Layout(
        world_size=world_size,
        num_layers=model.num_hidden_layers,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.kv_heads,
        ffn_size=model.ffn_size,
        seq_len=config.data.seq_len,
        max_seq_len=model.max_position_embeddings,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        zero_stage=parallel.zero_stage,
        sequence=parallel.sequence,
        offload=parallel.offload,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
    )

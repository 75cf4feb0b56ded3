"""What a start shows and records."""

from __future__ import annotations

from megatrain.config.schema import ParallelConfig
from megatrain.distributed.topology import Topology
from megatrain.train.start import layout_in_words


def test_the_layout_names_engine_and_chunks() -> None:
    parallel = ParallelConfig(engine="fsdp2", pipeline=2, pipeline_chunks=2, zero_stage=2)
    words = layout_in_words(parallel, Topology(pipeline=2, data=3, tensor=1))
    assert words == "6 rank(s): data 3 x tensor 1 x pipeline 2 in 2 chunks, fsdp2, ZeRO 2, recompute none"
    assert "pipeline 1, deepspeed" in layout_in_words(ParallelConfig(), Topology(1, 1, 1))

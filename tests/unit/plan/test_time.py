"""The time of a step follows from operations, bytes and rates, as worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatrain.config import RunConfig
from megatrain.errors import EXIT_USAGE, ConfigError
from megatrain.plan.choice import fastest
from megatrain.plan.cluster import LINK_SHARE, Cluster, find_nodes
from megatrain.plan.flops import flops_per_token
from megatrain.plan.hardware import find_device
from megatrain.plan.nearest import with_changes
from megatrain.plan.run_plan import Interruptions, RunPlan, make_plan
from megatrain.plan.stage_model import stage_models
from megatrain.plan.time import StepTime, pipeline_bubble, step_time

MODEL = {  # that of benchmarks/layouts.py, whose figures are in docs/parallelism.md
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 4096,
}
NODE = Cluster.of(1, 8, "h100", 400.0, 0.5)


def make_config(precision: str = "bf16", micro_batch: int = 1, **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": MODEL,
            "data": {"train": [{"path": "unused"}], "seq_len": 256},
            "train": {
                "steps": 1000,
                "global_batch_size": 4,
                "micro_batch_size": micro_batch,
                "precision": precision,
            },
            "optimizer": {"lr": 1.0e-3},
            "parallel": parallel,
        }
    )


def time_of(config: RunConfig, cluster: Cluster) -> StepTime:
    return step_time(stage_models(config, cluster.world_size), cluster)


def megabytes_sent(num_ranks: int, **parallel: Any) -> tuple[float, float, float]:
    """By tensor, pipeline and data: over links of a byte a second, seconds are bytes."""
    slow = replace(NODE, gpus_per_node=num_ranks, device=replace(NODE.device, link_bytes_per_second=1 / LINK_SHARE))
    time = time_of(make_config(**parallel), slow)
    return (time.tensor + time.hidden_tensor) / 1e6, time.pipeline / 1e6, (time.data + time.hidden) / 1e6


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "megabytes"),
    [
        (2, {"zero_stage": 0}, (0, 0, 16.0)),
        (2, {"zero_stage": 1}, (0, 0, 16.0 + 4.0)),
        (2, {"zero_stage": 2}, (0, 0, 16.0 + 4.0)),
        (2, {"zero_stage": 3}, (0, 0, 16.0 + 8.0)),
        (4, {"zero_stage": 3}, (0, 0, 12.0 + 6.0)),
        (2, {"zero_stage": 0, "tensor": 2}, (9.5, 0, 0)),
        (2, {"zero_stage": 0, "tensor": 2, "sequence": True}, (7.08 + 4.46 + 0.56, 0, 0)),
        (4, {"zero_stage": 0, "tensor": 4}, (14.2, 0, 0)),
        (4, {"zero_stage": 3, "tensor": 2}, (4.7, 0, 8.0 + 4.0)),
        (2, {"zero_stage": 0, "pipeline": 2}, (0, 0.5, 4.2 + 2.1)),  # of the tied table: gradients, weights
        (2, {"engine": "fsdp2", "zero_stage": 1}, (0, 0, 8.0 + 4.0)),
        (2, {"engine": "fsdp2", "zero_stage": 2}, (0, 0, 16.0 + 4.0)),
        (2, {"engine": "fsdp2", "zero_stage": 3}, (0, 0, 16.0 + 13.9)),  # weights but the tied table's twice
    ],
    ids=str,
)
def test_messages_are_those_that_were_measured(num_ranks, parallel, megabytes):
    """The table of docs/parallelism.md, "sent a step"."""
    assert megabytes_sent(num_ranks, **parallel) == pytest.approx(megabytes, abs=0.1)


def test_arithmetic_is_at_the_assumed_share():
    config = make_config()
    alone = replace(NODE, gpus_per_node=1)
    time = time_of(config, alone)
    operations = 4 * 256 * flops_per_token(config.model, 256)
    assert time.compute == pytest.approx(operations / (0.5 * 989.4e12))
    assert time.update == pytest.approx(30 * stage_models(config, 1)[0].num_parameters / 3350e9)
    assert (time.tensor, time.pipeline, time.bubble, time.data) == (0, 0, 0, 0)
    assert time.step == time.compute + time.update


def test_fsdp2_hides_messages_behind_its_passes():
    """All but the first gather and the last reduction, of the embedding, where links are fast enough."""
    config = make_config(engine="fsdp2", zero_stage=1)
    table = 4096 * 256 + 256  # and the last norm
    links = [replace(NODE.device, link_bytes_per_second=speed / LINK_SHARE) for speed in (1e13, 1e3)]
    near, far = (replace(NODE, gpus_per_node=2, device=device) for device in links)
    fast, slow = time_of(config, near), time_of(config, far)
    assert fast.data == pytest.approx((2 + 4) * table / 2 / 1e13)
    assert fast.hidden == pytest.approx((8.0e6 + 4.0e6) / 1e13 - fast.data, rel=0.01)
    assert slow.hidden == pytest.approx(fast.compute / 2)  # of one micro-batch of two: no more than it computes
    deepspeed = time_of(make_config(zero_stage=1), near)
    assert deepspeed.hidden == 0 < fast.step < deepspeed.step


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(2, 2, 4), (4, 1, 4), (2, 2, 1)])
def test_the_bubble_shrinks_with_chunks(ranks, chunks, count):
    config = make_config(pipeline=ranks, pipeline_chunks=chunks)
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 1})})
    config = with_changes(config, ("train.global_batch_size", count))
    fast = replace(NODE, gpus_per_node=ranks, device=replace(NODE.device, link_bytes_per_second=1e30))
    time = time_of(config, fast)
    share = time.bubble / (time.bubble + time.compute)
    assert share == pytest.approx(pipeline_bubble(config, count), rel=1e-3)
    if count >= ranks:
        assert pipeline_bubble(config, count) == pytest.approx((ranks - 1) / (chunks * count + ranks - 1))


def test_full_recomputation_costs_a_third_more():
    alone = replace(NODE, gpus_per_node=1)
    none, selective, full = (
        time_of(make_config(recompute=kind), alone).compute for kind in ("none", "selective", "full")
    )
    model = make_config().model
    head = 6 * model.hidden_size * model.vocab_size / flops_per_token(model, 256)
    assert full / none == pytest.approx(1 + (1 - head) / 3)
    assert none < selective < full


def test_like_stages_idle_for_the_bubble():
    """Stages differ by the embedding and the head: here those are made small."""
    config = make_config(pipeline=4)
    config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 1})})
    fast = replace(NODE, gpus_per_node=4, device=replace(NODE.device, link_bytes_per_second=1e30))
    time = time_of(config, fast)
    assert time.bubble / (time.bubble + time.compute) == pytest.approx(3 / 7, rel=1e-3)
    assert pipeline_bubble(config, 4) == 3 / 7
    assert pipeline_bubble(make_config(), 4) == 0.0


def test_the_slowest_stage_paces_a_pipeline():
    config = make_config(pipeline=2)
    fast = replace(NODE, gpus_per_node=2, device=replace(NODE.device, link_bytes_per_second=1e30))
    whole = time_of(make_config(), replace(NODE, gpus_per_node=1)).compute / 4  # of a micro-batch
    time = time_of(config, fast)
    assert time.compute + time.bubble == pytest.approx(3 * time.compute / 4 + whole)


def test_rings_between_nodes_use_ports_of_their_ranks():
    cluster = Cluster.of(4, 8, "h100", 400.0, 0.5)
    link, port = 0.8 * 450e9, 0.8 * 50e9  # what collectives reach
    assert cluster.bandwidth(8, 1) == pytest.approx(link)  # tensor ranks of one node
    assert cluster.bandwidth(32, 1) == pytest.approx(8 * port)  # data ranks, all of every node
    assert cluster.bandwidth(16, 2) == pytest.approx(4 * port)  # those of one of two tensor ranks
    assert cluster.bandwidth(4, 8) == pytest.approx(port)  # one a node
    assert cluster.border_bandwidth(4, 8) == pytest.approx(port)  # from stage to stage, of one node each
    assert cluster.border_bandwidth(4, 2) == pytest.approx(link)
    cut = replace(cluster, gpus_per_node=6)  # every second group of four lies on two nodes
    assert cut.bandwidth(4, 1) == pytest.approx(4 * port)
    assert replace(cluster, network_bytes_per_second=400e9).bandwidth(32, 1) == pytest.approx(link)


def make(config: RunConfig, cluster: Cluster) -> RunPlan:
    return make_plan(config, cluster, Interruptions(mtbf_hours_per_node=6300.0, restart_seconds=600.0))


def test_speed_mfu_and_days_follow_from_the_step():
    config = make_config("fp32", zero_stage=1)
    plan = make(config, replace(NODE, gpus_per_node=2))
    assert plan.tokens_per_second == pytest.approx(4 * 256 / plan.time.step)
    flops_per_second = plan.tokens_per_second * flops_per_token(config.model, 256)
    assert plan.mfu == pytest.approx(flops_per_second / (2 * 989.4e12))  # of the bf16 peak, in fp32 too
    assert plan.days == pytest.approx(1000 * plan.time.step / 86400)


def test_offloading_adds_transfer_time():
    alone = replace(NODE, gpus_per_node=1)
    near, far = (time_of(make_config(zero_stage=2, offload=kind), alone) for kind in ("none", "optimizer"))
    assert far.compute == near.compute
    assert far.update > 50 * near.update


@pytest.mark.parametrize(
    ("parallel", "nodes", "gpus", "expected"),
    [
        ({}, None, None, (1, 1)),
        ({"tensor": 2, "pipeline": 2}, None, None, (1, 4)),
        ({"tensor": 8, "pipeline": 4}, None, None, (4, 8)),
        ({"tensor": 4, "pipeline": 3}, None, None, (2, 6)),
        ({}, 2, None, (2, 8)),
        ({}, None, 4, (1, 4)),
        ({"tensor": 8}, None, 4, (2, 4)),
        ({}, 3, 2, (3, 2)),
    ],
    ids=str,
)
def test_open_sizes_become_the_smallest_legal_ones(parallel, nodes, gpus, expected):
    assert find_nodes(make_config(**parallel), nodes, gpus) == expected


def test_an_unknown_device_is_refused_listing_known_ones():
    with pytest.raises(ConfigError, match=r"h101.*known:.* h100,.*mi300x") as caught:
        Cluster.of(1, 8, "h101", 400.0, 0.5)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("device", ["a100", "h100", "h200", "b200", "mi300x", "l40s"])
def test_the_network_is_never_faster_than_links_within(device):
    assert find_device(device).link_bytes_per_second >= 16e9
    inside, outside = Cluster.of(1, 8, device, 100.0, 0.5), Cluster.of(8, 1, device, 100.0, 0.5)
    config = make_config(zero_stage=1).model_copy(
        update={"train": make_config().train.model_copy(update={"global_batch_size": 8})}
    )
    assert time_of(config, inside).data < time_of(config, outside).data


def test_a_ramp_takes_each_steps_time_and_tokens() -> None:
    config, one_gpu, never = make_config(), replace(NODE, gpus_per_node=1), Interruptions(1e9, 0.0)
    sizes = {size: with_changes(config, ("train.global_batch_size", size)) for size in (4, 8, 12)}
    ramp = ((0, 4), (100 * 4 * 256 - 1, 8), (100 * 4 * 256 + 50 * 8 * 256, 12))  # steps 0, 100 and 150
    plan = make_plan(with_changes(config, ("train.global_batch_size", ramp)), one_gpu, never)
    days = {size: make_plan(each, one_gpu, never).days / 1000 for size, each in sizes.items()}
    assert plan.days == pytest.approx(100 * days[4] + 50 * days[8] + 850 * days[12])
    assert plan.tokens == (100 * 4 + 50 * 8 + 850 * 12) * 256
    assert plan.tokens_per_step == 12 * 256
    assert plan.time == make_plan(sizes[12], one_gpu, never).time


def test_the_fastest_engine_and_chunks_are_named():
    between = Cluster.of(8, 1, "h100", 400.0, 0.5)
    config = with_changes(make_config(zero_stage=1), ("train.global_batch_size", 32))
    choice = fastest(config, between)
    assert choice.changes == (("parallel.engine", "fsdp2"),)
    assert choice.step_seconds == time_of(with_changes(config, *choice.changes), between).step
    assert fastest(with_changes(config, *choice.changes), between).changes == ()
    assert fastest(config, replace(between, device=replace(between.device, memory_bytes=0.0))).changes == ()  # no room
    assert fastest(make_config(zero_stage=1, offload="optimizer"), between).engine == "deepspeed"


@pytest.mark.parametrize("sequence", [False, True])
def test_products_hide_messages_of_the_backward_pass(sequence):
    """In four micro-batches: two of the four halves of an all-reduce of each block, and the head's."""
    config = make_config(zero_stage=0, tensor=2, sequence=sequence)
    links = [replace(NODE.device, link_bytes_per_second=speed / LINK_SHARE) for speed in (1e15, 1e3)]
    fast, slow = (time_of(config, replace(NODE, gpus_per_node=2, device=device)) for device in links)
    half = 256 * 256 * 2 / 2 / 1e15  # bytes of [T, hidden] in bf16, one rank's part
    assert fast.hidden_tensor == pytest.approx(4 * (2 * 2 * 4 + 2) * half)
    columns = 4 * (256 + 2 * 128 + 2 * 704) / 2 + 4096 / 2  # outputs of these layers on a rank, and the head's
    products = 2 if sequence else 1  # of the input's gradient, too, while the input is gathered
    rate = 0.5 * NODE.device.half_flops
    assert slow.hidden_tensor == pytest.approx(4 * products * 2 * 256 * 256 * columns / rate)

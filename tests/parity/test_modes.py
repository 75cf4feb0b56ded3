"""What goes beside the layouts: dropout, document masks, recomputation, precisions, micro-batches, uneven stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatrain.data import open_dataset
from tests.parity.figures import Pool
from tests.parity.matrix import parity_config

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {"zero_stage": 0}),
    "zero 1": (2, {"zero_stage": 1}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3": (2, {"zero_stage": 3}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline": (2, {"pipeline": 2}),
    "all axes": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "fsdp2 zero 1": (2, {"engine": "fsdp2", "zero_stage": 1}),
    "fsdp2 zero 2": (2, {"engine": "fsdp2", "zero_stage": 2}),
    "fsdp2 zero 3": (2, {"engine": "fsdp2", "zero_stage": 3}),
    "fsdp2 sequence": (2, {"engine": "fsdp2", "tensor": 2, "sequence": True}),
    "fsdp2 sequence, zero 3": (4, {"engine": "fsdp2", "tensor": 2, "sequence": True, "zero_stage": 3}),
    "fsdp2 all axes": (4, {"engine": "fsdp2", "tensor": 2, "pipeline": 2, "sequence": True, "zero_stage": 3}),
    "zero 1, optimizer offloaded": (2, {"zero_stage": 1, "offload": "optimizer"}),
    "zero 2, optimizer offloaded": (2, {"zero_stage": 2, "offload": "optimizer"}),
    "zero 3, all offloaded": (2, {"zero_stage": 3, "offload": "all"}),
    "pipeline, optimizer offloaded": (2, {"pipeline": 2, "offload": "optimizer"}),
    "tensor, all offloaded": (2, {"tensor": 2, "zero_stage": 3, "offload": "all"}),
}
OFFLOADED = [name for name in LAYOUTS if name.endswith("offloaded")]
FSDP2 = [name for name in LAYOUTS if name.startswith("fsdp2")]
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
NUM_STEPS = 4


def layouts(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("num_ranks", "parallel"), [LAYOUTS[name] for name in names], ids=names)


@pytest.mark.sample(3)
@layouts(*OFFLOADED)
def test_what_lives_in_cpu_memory_trains_the_same(num_ranks, parallel, pool: Pool):
    config = parity_config(pool.data, "llama_tied", parallel=parallel)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone("llama_tied", NUM_STEPS))


@pytest.mark.sample(5)
@pytest.mark.parametrize("model", ["llama_tied", "gpt2"])
@layouts("data", "sequence", "pipeline", "all axes", "fsdp2 sequence, zero 3")
def test_every_layout_drops_what_one_process_drops(model, num_ranks, parallel, pool: Pool):
    config = parity_config(pool.data, model, model=DROPOUT, parallel=parallel)
    alone = pool.alone(model, NUM_STEPS, model=DROPOUT)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(alone)
    assert alone.losses != pool.alone(model, NUM_STEPS).losses


def test_dropout_repeats_between_runs_and_differs_between_steps(pool: Pool):
    """A step is an epoch and nothing is learned: without dropout, all losses are one number."""
    windows = (open_dataset(pool.data.held_out).num_tokens - 1) // 32
    sections: dict[str, dict[str, Any]] = {
        "data": {"train": [{"path": str(pool.data.held_out)}]},
        "train": {"global_batch_size": windows, "micro_batch_size": windows},
        "optimizer": {"lr": 0.0},
    }
    plain = pool.train(1, parity_config(pool.data, "llama", **sections), NUM_STEPS)
    assert max(plain.losses) - min(plain.losses) < 1e-5
    config = parity_config(pool.data, "llama", model=DROPOUT, **sections)
    dropped = pool.train(1, config, NUM_STEPS)
    assert min(abs(a - b) for a, b in zip(dropped.losses, dropped.losses[1:], strict=False)) > 1e-5
    pool.train(1, config, NUM_STEPS).assert_is(dropped)


@pytest.mark.sample(8)
@pytest.mark.parametrize("model", ["llama_tied", "gpt2", "mistral"])
@layouts("zero 3", "tensor", "sequence", "pipeline", "all axes", "fsdp2 zero 1", "fsdp2 sequence, zero 3")
def test_documents_are_kept_apart_as_on_one_rank(model, num_ranks, parallel, pool: Pool, short_documents: Path):
    data: dict[str, Any] = {"train": [{"path": str(short_documents)}], "document_mask": True}
    alone = pool.alone(model, NUM_STEPS, data=data)
    config = parity_config(pool.data, model, data=data, parallel=parallel)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(alone)
    unmasked = pool.alone(model, NUM_STEPS, data={**data, "document_mask": False})
    assert max(abs(a - b) for a, b in zip(alone.losses, unmasked.losses, strict=True)) > 1e-4  # the mask matters


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("llama_tied", "zero 3"),
        ("llama_mqa", "sequence"),
        ("gpt2_tied", "pipeline"),
        ("gpt2", "all axes"),
        ("llama_tied", "fsdp2 zero 3"),
        ("gpt2", "fsdp2 sequence, zero 3"),
    ],
)
def test_recomputation_changes_no_bit(model, layout, pool: Pool):
    num_ranks, parallel = LAYOUTS[layout]

    def train(**recompute: Any) -> Any:
        config = parity_config(pool.data, model, model=DROPOUT, parallel={**parallel, **recompute})
        return pool.train(num_ranks, config, NUM_STEPS)

    kept = train(recompute="none")
    train(recompute="selective").assert_is(kept)
    train(recompute="full").assert_is(kept)
    train(recompute="full", recompute_every=2).assert_is(kept)


@pytest.mark.sample(5)
@layouts("data", "zero 1", "zero 2", "zero 3", "sequence", "pipeline", *FSDP2)
def test_bf16_layouts_train_like_one_rank(num_ranks, parallel, pool: Pool):
    train = {"precision": "bf16"}
    config = parity_config(pool.data, "llama_tied", train=train, parallel=parallel)
    alone = pool.alone("llama_tied", train=train)
    pool.train(num_ranks, config).assert_equals(alone, loss=2e-3, norm=2e-2, weight=None)


@pytest.mark.sample(2)
@layouts("sequence", "pipeline", "fsdp2 zero 1", "fsdp2 sequence, zero 3")
def test_fp16_layouts_train_like_one_rank(num_ranks, parallel, pool: Pool):
    train = {"precision": "fp16", "initial_loss_scale_power": 8}
    config = parity_config(pool.data, "llama_tied", train=train, parallel=parallel)
    alone = pool.alone("llama_tied", NUM_STEPS, train=train)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(alone, loss=2e-3, norm=1e-2, weight=None)


@pytest.mark.parametrize("model", ["llama", "gpt2_tied"])
def test_micro_batch_gradients_add_up(model, pool: Pool):
    small = pool.alone(model, train={"micro_batch_size": 1})
    small.assert_equals(pool.alone(model, train={"micro_batch_size": 4}), loss=1e-5, norm=1e-5)


RAMP = [[0, 4], [100, 8], [500, 12], [1200, 8]]
"""A step of 4 sequences of 32 tokens, two of 8, two of 12; then 8. With 4 at once: micro-batches 1, 2, 2, 3, 3, 2."""


@pytest.mark.sample(6)
@layouts("data", "zero 1", "zero 2", "zero 3", "sequence", "pipeline", "all axes", *OFFLOADED, *FSDP2)
def test_a_batch_size_ramp_trains_like_one_process(num_ranks, parallel, pool: Pool):
    train = {"global_batch_size": RAMP, "micro_batch_size": 2}
    config = parity_config(pool.data, "llama_tied", train=train, parallel=parallel)
    pool.train(num_ranks, config, 7).assert_equals(pool.alone("llama_tied", 7, train=train))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_micro_batch_gradients_add_up_on_a_ramp(precision, pool: Pool):
    train = {"global_batch_size": RAMP, "precision": precision}
    whole = pool.alone("llama_tied", 7, train={**train, "micro_batch_size": 4})
    loss, norm = (1e-5, 1e-5) if precision == "fp32" else (2e-3, 2e-2)
    small = pool.alone("llama_tied", 7, train={**train, "micro_batch_size": 1})
    small.assert_equals(whole, loss=loss, norm=norm, weight=None)


@pytest.mark.sample(2)
@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 8])
def test_a_pipeline_takes_any_number_of_micro_batches(num_micro_batches, pool: Pool):
    """Fewer than its four stages, as many, and more."""
    train = {"micro_batch_size": 8 // num_micro_batches}
    config = parity_config(pool.data, "llama_tied", train=train, parallel={"pipeline": 4})
    pool.train(4, config, NUM_STEPS).assert_equals(pool.alone("llama_tied", NUM_STEPS))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("num_layers", "num_stages"), [(3, 2), (5, 2), (5, 4), (7, 4)])
def test_stages_need_not_have_equally_many_layers(num_layers, num_stages, pool: Pool):
    model = {"num_hidden_layers": num_layers}
    config = parity_config(pool.data, "gpt2_tied", model=model, parallel={"pipeline": num_stages})
    pool.train(num_stages, config, NUM_STEPS).assert_equals(pool.alone("gpt2_tied", NUM_STEPS, model=model))


@pytest.mark.sample(3)
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@layouts("sequence", "fsdp2 zero 3")
def test_a_gpus_kernels_train_the_same(documents, num_ranks, parallel, pool: Pool, short_documents: Path):
    """Fused attention and norms, and attention by the documents' borders, beside what a CPU computes by itself."""
    data = {"train": [{"path": str(short_documents)}], "document_mask": True} if documents else {}
    config = parity_config(pool.data, "llama_tied", data=data, parallel=parallel, model={"attention": "flash"})
    alone = pool.alone("llama_tied", NUM_STEPS, data=data)
    pool.train(num_ranks, config, NUM_STEPS, gpu_kernels=True).assert_equals(alone)

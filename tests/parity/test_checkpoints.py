"""Any layout loads what any other saved, whatever the engines: every bit of the state, and goes on as it would have.

The same layout gives the same losses to the last bit; another one within 1e-4 in fp32, as all layouts train alike, and
within 1e-3 in bf16: an activation has 8 significant bits there, and each layout rounds other partial sums to them.
`make test` takes a few pairs, `-m slow` each layout of a sample as source and as target, MEGATRAIN_ACCEPTANCE=1 all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.data import open_dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches
from megatrain.inference.loading import load_decoder
from megatrain.objectives.next_token import ConcatSource
from megatrain.train.convert import export_checkpoint
from tests.parity.figures import Pool
from tests.parity.matrix import CLASSIFIERS, parity_config
from tests.parity.saves import Layout, Saves
from tests.parity.worker import NUM_VALIDATION_WINDOWS
from tests.runs import ACCEPTANCE

slow = pytest.mark.slow
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3}
OTHER_PRECISION = 5e-3
# Neighbours differ in as much as they can: each is loaded by the next one.
SAMPLE = (
    Layout("1", 1, {}, "llama_tied"),
    Layout("2-zero3", 2, {"zero_stage": 3}, "gpt2_tied"),
    Layout("4-tensor2-pipeline2-sequence", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, "llama_tied"),
    Layout("2-zero2", 2, {"zero_stage": 2}, "llama_mqa"),
    Layout("4-tensor4", 4, {"tensor": 4}, "llama_tied"),
    Layout("2-pipeline2-zero1", 2, {"pipeline": 2, "zero_stage": 1}, "gpt2_tied"),
    Layout("2-pipeline2-chunks2-zero2", 2, {"pipeline": 2, "pipeline_chunks": 2, "zero_stage": 2}, "llama_tied"),
    Layout("2-fsdp2-zero1", 2, {"engine": "fsdp2", "zero_stage": 1}, "gpt2_tied"),
    Layout("2-zero2-optimizer-offloaded", 2, {"zero_stage": 2, "offload": "optimizer"}, "llama_tied"),
    Layout("2-tensor2", 2, {"tensor": 2}, "qwen3"),
    Layout("2-tensor2-sequence", 2, {"tensor": 2, "sequence": True}, "bert"),
    Layout("2-tensor2-sequence-zero1", 2, {"tensor": 2, "sequence": True, "zero_stage": 1}, "vit"),
    Layout("2-zero3-classifier", 2, {"zero_stage": 3}, "bert_classifier"),
    Layout("2-tensor2-classifier", 2, {"tensor": 2}, "bert_classifier"),
    Layout("2-zero1", 2, {"zero_stage": 1}, "llama"),
    Layout(
        "4-fsdp2-tensor2-sequence-zero3",
        4,
        {"engine": "fsdp2", "tensor": 2, "sequence": True, "zero_stage": 3},
        "llama_tied",
    ),
    Layout("8-tensor2-pipeline2-zero1", 8, {"tensor": 2, "pipeline": 2, "zero_stage": 1}, "llama_tied"),
    Layout("2-zero3-offloaded", 2, {"zero_stage": 3, "offload": "all"}, "llama_mqa"),
    Layout("4-fsdp2-zero2", 4, {"engine": "fsdp2", "zero_stage": 2}, "llama_mqa"),
    Layout(
        "4-fsdp2-pipeline2-chunks2-zero3",
        4,
        {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2, "zero_stage": 3},
        "gpt2_tied",
    ),
    Layout("1-zero1", 1, {"zero_stage": 1}, "qwen3"),
    Layout("2-fsdp2-zero3", 2, {"engine": "fsdp2", "zero_stage": 3}, "vit"),
    Layout(
        "4-fsdp2-pipeline2-chunks2-zero3",
        4,
        {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2, "zero_stage": 3},
        "gpt2_tied",
    ),
    Layout("2-fsdp2-tensor2", 2, {"engine": "fsdp2", "tensor": 2, "zero_stage": 0}, "qwen3"),
    Layout("4-pipeline2-zero1", 4, {"pipeline": 2, "zero_stage": 1}, "qwen3"),
    Layout("2-tensor2-sequence-zero2", 2, {"tensor": 2, "sequence": True, "zero_stage": 2}, "llama_tied"),
)
LAYOUTS = (
    *SAMPLE,
    Layout("4-pipeline4", 4, {"pipeline": 4}, "gpt2"),
    Layout("8-zero3", 8, {"zero_stage": 3}, "llama_tied"),
    Layout("4-tensor4-sequence-zero1", 4, {"tensor": 4, "sequence": True, "zero_stage": 1}, "gpt2_tied"),
    Layout("4-tensor2-zero3", 4, {"tensor": 2, "zero_stage": 3}, "gpt2_tied"),
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}
QUICK = (
    ("2-zero3", "2-pipeline2-zero1", "fp32"),
    ("2-pipeline2-zero1", "2-pipeline2-zero1", "bf16"),
    ("2-pipeline2-zero1", "2-pipeline2-chunks2-zero2", "fp32"),
    ("4-tensor2-pipeline2-sequence", "2-zero3", "bf16"),
    ("2-tensor2-sequence", "2-tensor2-sequence", "fp32"),
    ("2-tensor2-sequence-zero1", "2-zero3", "bf16"),
    ("2-zero2", "2-fsdp2-zero1", "fp32"),
    ("2-fsdp2-zero1", "2-zero3", "bf16"),
)


def _selected() -> list[object]:
    following = (*SAMPLE[1:], SAMPLE[0])
    every = [(a, b) for a, b in itertools.product(LAYOUTS, LAYOUTS) if _can_load(a.model, b)]
    pairs = every if ACCEPTANCE else list(zip(SAMPLE, following, strict=True))
    precisions = ("fp32", "bf16") if ACCEPTANCE else ("fp32",)
    chosen = [(a.name, b.name, precision) for precision in precisions for a, b in pairs]
    return [
        pytest.param(BY_NAME[a], BY_NAME[b], precision, id=f"{a} to {b} {precision}", marks=marks)
        for a, b, precision in dict.fromkeys([*QUICK, *chosen])
        for marks in [() if (a, b, precision) in QUICK else pytest.mark.slow]
    ]


def _can_load(model: str, layout: Layout) -> bool:
    """Four tensor ranks cannot share out an image's 10 tokens."""
    return model not in CLASSIFIERS or not layout.parallel.get("sequence") or layout.parallel["tensor"] == 2


@pytest.fixture(scope="session")
def saves(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(pool, tmp_path_factory.mktemp("saves"))


@pytest.mark.parametrize(("source", "target", "precision"), _selected())
def test_state_of_one_layout_goes_on_under_another(
    source: Layout, target: Layout, precision: str, saves: Saves
) -> None:
    saved = saves.of(source, precision=precision)
    assert {kind for _, kind in saved.state} == {"weight", "exp_avg", "exp_avg_sq"}
    loaded = saves.load(saved, source, target, precision=precision)
    loaded.assert_holds(saved)
    if source == target:
        assert loaded.losses == saved.losses
    else:
        assert loaded.distance(saved) < TOLERANCE[precision]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("num_ranks", "parallel", "precision"),
    [
        (2, {"zero_stage": 1}, "fp32"),
        (2, {"zero_stage": 3}, "bf16"),
        pytest.param(2, {"zero_stage": 0}, "bf16", marks=slow),
        pytest.param(2, {"zero_stage": 0}, "fp32", marks=slow),
        pytest.param(2, {"zero_stage": 1}, "bf16", marks=slow),
        pytest.param(2, {"zero_stage": 2, "offload": "optimizer"}, "bf16", marks=slow),
        pytest.param(2, {"zero_stage": 3, "offload": "all"}, "fp32", marks=slow),
        pytest.param(2, {"tensor": 2}, "bf16", marks=slow),
    ],
)
def test_state_under_another_parameter_name_is_refused(
    num_ranks: int, parallel: dict[str, Any], precision: str, pool: Pool, tmp_path: Path
) -> None:
    config = parity_config(pool.data, "llama", parallel=parallel, train={"precision": precision})
    for one, other in (("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "mlp.down_proj")):
        swapped = [f"model.layers.1.{name}.weight" for name in (one, other)]
        case = {"config": config, "num_steps": 1, "save": str(tmp_path / other), "swapped": swapped}
        problem = pool.answer(num_ranks, case)["problem"]
        words = "what would be saved as {} is not that parameter"
        assert problem.startswith(tuple(words.format(name) for name in swapped))


@pytest.mark.sample(4)
@slow
@pytest.mark.parametrize("name", ["4-tensor2-pipeline2-sequence", "2-zero3-offloaded", "2-zero2", "2-fsdp2-zero1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_layout_resumes_bit_exactly(name: str, precision: str, saves: Saves) -> None:
    saved = saves.of(BY_NAME[name], precision=precision)
    loaded = saves.load(saved, BY_NAME[name], BY_NAME[name], precision=precision)
    loaded.assert_holds(saved)
    assert loaded.losses == saved.losses


@pytest.mark.sample(2)
@slow
@pytest.mark.parametrize(
    ("before", "after", "source", "target"),
    [
        ("fp32", "bf16", "2-zero3", "2-zero3"),
        ("bf16", "fp32", "4-tensor2-pipeline2-sequence", "2-zero2"),
        ("bf16", "fp16", "2-zero2", "2-pipeline2-zero1"),
    ],
)
def test_precision_may_change_with_the_state_unchanged(
    before: str, after: str, source: str, target: str, saves: Saves
) -> None:
    """Whatever the model computes in, the state is fp32. The losses are apart by what a half precision rounds."""
    scale = {"initial_loss_scale_power": 8} if after == "fp16" else {}
    saved = saves.of(BY_NAME[source], precision=before)
    loaded = saves.load(saved, BY_NAME[source], BY_NAME[target], precision=after, **scale)
    loaded.assert_holds(saved)
    assert 0 < loaded.distance(saved) < OTHER_PRECISION


@pytest.mark.sample(2)
@slow
@pytest.mark.parametrize("target", ["2-zero2", "1", "2-zero3", "4-tensor2-pipeline2-sequence", "2-fsdp2-zero1"])
def test_fp16_resumes_with_its_scale_and_update_count(target: str, saves: Saves) -> None:
    """The scale begins too high: updates are left out, and the scale falls, before the state is saved.

    It stays near the largest that is possible, so that another layout may leave out other updates from there on: of it
    only the next loss is compared.
    """
    source = BY_NAME["2-zero2"]
    train = {"precision": "fp16", "initial_loss_scale_power": 20, "loss_scale_window": 3}
    saved = saves.of(source, num_steps=8, **train)
    assert 0 < saved.after["num_updates"] < 8
    assert saved.after["loss_scale"]["cur_scale"] < 2**20
    loaded = saves.load(saved, source, BY_NAME[target], **train)
    loaded.assert_holds(saved)
    assert loaded.after == saved.after
    if target == source.name:
        assert loaded.losses == saved.losses
    else:
        assert abs(loaded.losses[0] / saved.losses[0] - 1) < TOLERANCE["fp16"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    [
        "4-tensor2-pipeline2-sequence",
        pytest.param("2-tensor2", marks=slow),
        pytest.param("2-pipeline2-zero1", marks=slow),
        pytest.param("2-zero3-offloaded", marks=slow),
    ],
)
def test_an_exported_layout_computes_alike_in_transformers(name: str, saves: Saves, pool: Pool, tmp_path: Path) -> None:
    """The loss that the ranks had on the validation windows, and the logits of the checkpoint on one device."""
    saved = saves.last(BY_NAME[name])
    export_checkpoint(saved.folder, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    reader = CheckpointReader(saved.folder)
    ours = load_decoder(reader)
    total, count = 0.0, 0
    for batch in validation_windows(reader.manifest.config):
        with torch.no_grad():
            logits = model(batch.tokens_BT).logits
            context = ours.make_context(batch.positions_BT, None, None, torch.float32)
            torch.testing.assert_close(ours.logits(batch.tokens_BT, context), logits, atol=1e-5, rtol=1e-5)
            total += float(functional.cross_entropy(logits.flatten(0, 1), batch.targets_BM.flatten(), reduction="sum"))
        count += batch.targets_BM.numel()
    assert abs(total / count - saved.validation) < 1e-5


def validation_windows(config: Mapping[str, Any]) -> EvaluationBatches:
    """Those that the workers evaluate on."""
    sources = [
        ConcatSource(open_dataset(entry["path"]), config["data"]["seq_len"], False) for entry in config["data"]["train"]
    ]
    return EvaluationBatches(BatchMaker(sources, 1), 0, 1, limit=NUM_VALIDATION_WINDOWS)

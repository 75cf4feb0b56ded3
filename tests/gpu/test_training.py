"""Training on one GPU beside the same training on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatrain
from megatrain.checkpoint.arena import Arena
from megatrain.checkpoint.stores import find_store
from megatrain.config import ModelConfig
from megatrain.distributed.fragment import FlatShard, TensorSlice
from megatrain.model.init import InitialWeights
from tests.runs import Metrics, TinyData, tiny_config, write_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

NUM_STEPS = 6
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model": {"family": "qwen3"}},
    "gpt2": {"model": {"family": "gpt2", "num_key_value_heads": 4}},
    "documents": {"data": {"document_mask": True}},
    "packed": {"data": {"document_mask": True, "packing": "best_fit"}},
    "dropout": {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
}
ENGINES: dict[str, dict[str, Any]] = {
    **{f"ZeRO {stage}": {"zero_stage": stage} for stage in range(4)},
    "FSDP2, ZeRO 1": {"engine": "fsdp2", "zero_stage": 1},
    "FSDP2, ZeRO 3": {"engine": "fsdp2", "zero_stage": 3},
    "optimizer offloaded": {"zero_stage": 2, "offload": "optimizer"},
    "all offloaded": {"zero_stage": 3, "offload": "all"},
    "recomputed": {"recompute": "full"},
    "partly recomputed": {"recompute": "selective"},
}

HALF: dict[str, dict[str, Any]] = {"bf16": {}, "fp16": {"initial_loss_scale_power": 8}}


def train(config: dict[str, Any], **environment: str) -> Metrics:
    """One rank, as a user starts it; what it logged."""
    run_dir = Path(config["run"]["dir"])
    path = write_config(run_dir.with_suffix(".yaml"), config)
    ended = subprocess.run(
        [sys.executable, "-m", "megatrain", "train", str(path), "--procs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Metrics.read(run_dir)


def make_config(data: TinyData, run_dir: Path, *layers: dict[str, Any]) -> dict[str, Any]:
    sections: dict[str, dict[str, Any]] = {"train": {"steps": NUM_STEPS, "precision": "fp32"}}
    for layer in layers:
        for name, section in layer.items():
            sections[name] = {**sections.get(name, {}), **section}
    return tiny_config(data, run_dir, **sections)


@pytest.fixture(scope="module")
def on_cpu(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metrics]:
    """Each model, trained on the CPU in fp32 without a parallel layout."""
    folder = tmp_path_factory.mktemp("cpu")
    return {
        name: train(make_config(tiny_data, folder / str(number), model), **NO_GPU)
        for number, (name, model) in enumerate(MODELS.items())
    }


def assert_near(found: Metrics, wanted: Metrics, loss: float, norm: float) -> None:
    assert found.steps == wanted.steps
    assert np.abs(np.subtract(found.losses, wanted.losses)).max() < loss, (found.losses, wanted.losses)
    assert np.abs(np.divide(found.norms, wanted.norms) - 1).max() < norm, (found.norms, wanted.norms)


@pytest.mark.parametrize("model", MODELS)
def test_fp32_training_equals_the_cpus(model, on_cpu, tiny_data: TinyData, tmp_path: Path):
    found = train(make_config(tiny_data, tmp_path / "run", MODELS[model]))
    assert_near(found, on_cpu[model], loss=1e-5, norm=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_and_stage_equals_the_cpu(engine, on_cpu, tiny_data: TinyData, tmp_path: Path):
    found = train(make_config(tiny_data, tmp_path / "run", {"parallel": ENGINES[engine]}))
    assert_near(found, on_cpu["llama"], loss=1e-5, norm=1e-4)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("engine", ["ZeRO 1", "FSDP2, ZeRO 1"])
@pytest.mark.parametrize("model", ["llama", "documents"])
def test_half_precision_stays_near_fp32(model, engine, precision, on_cpu, tiny_data: TinyData, tmp_path: Path):
    half = {"train": {"precision": precision, **HALF[precision]}, "parallel": ENGINES[engine]}
    found = train(make_config(tiny_data, tmp_path / "run", MODELS[model], half))
    assert_near(found, on_cpu[model], loss=0.02, norm=0.05)


@pytest.mark.parametrize("engine", ["ZeRO 0", "ZeRO 1", "FSDP2, ZeRO 1", "all offloaded"])
@pytest.mark.parametrize("model", ["llama", "documents"])
def test_a_resumed_run_is_the_same(model, engine, tiny_data: TinyData, tmp_path: Path):
    """In bf16, to the last bit: the newest checkpoint is taken away, and the second half trained again."""
    half = {"train": {"precision": "bf16"}, "parallel": ENGINES[engine], "checkpoint": {"every_steps": NUM_STEPS // 2}}
    config = make_config(tiny_data, tmp_path / "run", MODELS[model], half)
    whole = train(config)
    newest = max(find_store(tmp_path / "run").list(), key=lambda checkpoint: checkpoint.step)
    assert newest.step == NUM_STEPS
    shutil.rmtree(newest.path)
    again = train(config)
    assert again.steps == whole.steps
    assert (again.losses, again.norms) == (whole.losses, whole.norms)


def test_a_run_resumes_on_the_other_device(on_cpu, tiny_data: TinyData, tmp_path: Path):
    begun = {"checkpoint": {"every_steps": NUM_STEPS // 2}}
    config = make_config(tiny_data, tmp_path / "run", begun)
    train(config)
    newest = max(find_store(tmp_path / "run").list(), key=lambda checkpoint: checkpoint.step)
    shutil.rmtree(newest.path)
    assert_near(train(config, **NO_GPU), on_cpu["llama"], loss=1e-5, norm=1e-4)


def test_an_export_computes_what_the_run_does(tiny_data: TinyData, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    train(make_config(tiny_data, tmp_path / "run"))
    words = [sys.executable, "-m", "megatrain", "export", str(tmp_path / "run"), "--out", str(tmp_path / "hf")]
    subprocess.run(words, check=True, capture_output=True)
    ids = list(range(5, 45))
    ours = torch.from_numpy(np.asarray(megatrain.load(tmp_path / "run").logits(ids)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).to(device)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids], device=device)).logits[0].cpu()
    torch.testing.assert_close(ours.float().cpu(), logits, atol=1e-5, rtol=1e-4)


def test_copies_of_a_save_are_pinned_without_rounding() -> None:
    arena, state = Arena(), torch.arange(3 << 20, dtype=torch.float32, device="cuda")
    copy = arena.copy("weight", state)
    torch.cuda.synchronize()
    assert copy.is_pinned()
    assert torch.equal(copy, state.cpu())
    assert arena.num_bytes == state.nbytes  # 12 MiB, no 16
    arena.close()


def test_initial_weights_have_the_cpus_bits() -> None:
    config = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    part = TensorSlice((100, 35), (1500, 600))
    shard = FlatShard("model.layers.1.self_attn.q_proj.weight", (2000, 700), part, 3, part.numel - 3)
    source, made = InitialWeights(config, 1), torch.empty(shard.length, device="cuda")
    source.read_into(made, shard, "weight")
    assert torch.equal(made.cpu(), source.read(shard, "weight"))

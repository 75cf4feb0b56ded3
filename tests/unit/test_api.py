"""megatrain from Python. docs/python.md shows each of these; it names no function that this file does not call."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import megatrain
from megatrain.checkpoint.manifest import read_manifest
from megatrain.config.load import load as load_config
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.plan.cluster import Cluster
from megatrain.plan.flops import num_parameters
from megatrain.plan.run_plan import Interruptions, make_plan
from megatrain.train.convert import export_checkpoint
from tests.in_process import Ended
from tests.runs import TinyData, tiny_config, write_config

PROMPT = "The statement"


@pytest.fixture(scope="module")
def model(finished_run: Path) -> megatrain.Model:
    return megatrain.load(str(finished_run))


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_checkpoint(finished_run, folder)
    return folder


def test_importing_megatrain_imports_no_torch() -> None:
    script = "import sys, megatrain; assert megatrain.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_logits_are_those_of_transformers(model: megatrain.Model, exported: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = [[3, 5, 7, 11], [2, 4, 6, 8]]
    with torch.inference_mode():
        expected = twin(torch.tensor(ids)).logits
    for given in (ids, np.array(ids, dtype=np.uint16), torch.tensor(ids, dtype=torch.int32)):
        torch.testing.assert_close(model.logits(given), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logits(ids[1]), expected[1], atol=1e-4, rtol=1e-4)


def test_a_huggingface_folder_is_the_same_model(model: megatrain.Model, exported: Path) -> None:
    loaded = megatrain.load(exported)
    state, expected = loaded.module.state_dict(), model.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert loaded.generate(PROMPT, 8) == model.generate(PROMPT, 8)


def test_text_is_generated_as_the_command_does(
    model: megatrain.Model, finished_run: Path, run_megatrain: Callable[..., Ended]
) -> None:
    options = ["--max-new-tokens", "8", "--temperature", "1", "--top-k", "20", "--seed", "3"]
    ended = run_megatrain("generate", finished_run, "--prompt", PROMPT, *options)
    assert ended.code == 0, ended.err
    assert ended.out == PROMPT + model.generate(PROMPT, 8, temperature=1.0, top_k=20, seed=3) + "\n"


def test_token_ids_are_generated_after_token_ids(model: megatrain.Model) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPT)
    new = model.generate(ids, max_new_tokens=8)
    assert len(new) <= 8
    assert new[0] == int(model.logits(ids)[-1].argmax())
    assert model.tokenizer.decode(ids + new) == PROMPT + model.generate(PROMPT, max_new_tokens=8)


def test_one_stop_may_be_a_text(model: megatrain.Model) -> None:
    text = model.generate(PROMPT, 8)
    stop = text[1:4]
    assert model.generate(PROMPT, 8, stop=stop) == model.generate(PROMPT, 8, stop=[stop]) == text[: text.index(stop)]


@pytest.mark.parametrize("prompt", [[1.5], [None]])
def test_a_prompt_of_other_things_is_refused(model: megatrain.Model, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match="neither a text nor token ids"):
        model.generate(prompt)


def test_stops_that_end_nothing_are_refused(model: megatrain.Model) -> None:
    with pytest.raises(ConfigError, match="empty text"):
        model.generate(PROMPT, stop="")
    with pytest.raises(ConfigError, match="token ids"):
        model.generate([1, 2], stop=["x"])


def test_a_callbacks_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no object of a class that extends megatrain\.Callback"):
        megatrain.train(tmp_path / "absent.yaml", callbacks=[megatrain.Callback])  # type: ignore[list-item]


def test_a_full_context_gives_a_warning(model: megatrain.Model) -> None:
    with pytest.warns(UserWarning, match="context is full"):
        model.generate(PROMPT, max_new_tokens=1000)


def test_a_config_gives_its_initial_weights(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tiny_data, tmp_path / "run")
    with pytest.raises(ConfigError, match="vocab_size is taken from the dataset"):
        megatrain.load(write_config(tmp_path / "unknown.yaml", config))
    config["model"]["vocab_size"] = 100
    first, second = (megatrain.load(write_config(tmp_path / "run.yaml", config)) for _ in range(2))
    assert first.tokenizer is None
    assert first.config.vocab_size == 100
    assert torch.equal(first.logits([1, 2, 3]), second.logits([1, 2, 3]))
    with pytest.raises(ConfigError, match="without a tokenizer"):
        first.generate(PROMPT)


@pytest.mark.parametrize(
    "ids", [[[]], [-1], [10**6], [1.5], list(range(65)), [[[1]]], np.zeros((2, 0), int), [[1], [2, 3]], [2**70]]
)
def test_ids_that_are_none_are_refused(model: megatrain.Model, ids: list[int]) -> None:
    with pytest.raises(ConfigError, match="ids"):
        model.logits(ids)


def test_the_best_checkpoint_is_loaded(finished_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    manifest = run_dir / "checkpoints" / "step-00000004" / "manifest.json"
    changed = read_manifest(manifest.parent).model_copy(update={"validation_loss": 0.001})
    manifest.write_bytes(changed.encode())
    best, fourth = megatrain.load(run_dir, best=True), megatrain.load(manifest.parent)
    assert torch.equal(best.logits([1, 2]), fourth.logits([1, 2]))
    assert not torch.equal(best.logits([1, 2]), megatrain.load(run_dir).logits([1, 2]))
    with pytest.raises(CheckpointError, match="is one checkpoint"):
        megatrain.load(manifest.parent, best=True)


@pytest.mark.slow
def test_a_callback_sees_a_run_and_stops_it(tiny_data: TinyData, tmp_path: Path) -> None:
    sections = {"train": {"steps": 6, "eval_every_steps": 2, "eval_batches": 1}, "checkpoint": {"every_steps": 2}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections))
    script = f"""
import os, signal, megatrain
from tests.recorder import Recorder
recorder, former = Recorder(), signal.getsignal(signal.SIGINT)
is_rank = lambda: [name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
was_rank = is_rank()
run = megatrain.train({str(config)!r}, ["optimizer.lr=0.002"], [recorder])
assert signal.getsignal(signal.SIGINT) is former
assert is_rank() == was_rank  # processes that it starts now are no ranks of its
assert [call for call in recorder.calls if call[0] not in ("epochs", "save")] == [
    ("step", 1), ("validation", 2), ("step", 2), ("step", 3), ("validation", 4), ("step", 4), ("end", 4)]
assert [step for name, step in recorder.calls if name == "save"] == [2, 4]  # in the background: later than its step
assert run.config.optimizer.lr == 0.002 and run.checkpoints[-1].step == 4
assert megatrain.train({str(config)!r}, ["optimizer.lr=0.002"]).checkpoints[-1].step == 6
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(place)):
            megatrain.load(place)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        megatrain.lod  # noqa: B018


def test_a_run_is_read(finished_run: Path) -> None:
    run = megatrain.open_run(str(finished_run))
    assert run.config.train.steps == 6
    assert run.metrics["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert run.metrics["loss"].null_count == 0
    assert "parts.forward_backward" in run.metrics.column_names
    assert run.validations["step"].to_pylist()[-1] == 6
    assert [checkpoint.step for checkpoint in run.checkpoints] == [2, 4, 6]
    assert all(checkpoint.good for checkpoint in run.checkpoints)
    assert run.goodput is not None
    assert run.goodput.training > 0
    assert run.events[0]["event"] == "start"


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a run folder"):
        megatrain.open_run(tmp_path)


def test_a_config_is_planned(tiny_data: TinyData) -> None:
    config = load_config("llama_1b_8xh100", [f"data.train=[{tiny_data.prose}]", "model.vocab_size=65536"])
    plan = make_plan(config, Cluster.of(1, 8, "h100", 400.0, 0.5), Interruptions(6300.0, 600.0)).to_json()
    assert (plan["parameters"], plan["world_size"], plan["problems"]) == (num_parameters(config.model), 8, [])


def test_the_apis_page_names_what_there_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)\n    options: \{(?:members: \[(.*?)\])?", page, re.MULTILINE)
    members = {(module, name) for module, names in found for name in names.split(", ") if name}
    assert [each for each in members if not hasattr(importlib.import_module(each[0]), each[1])] == []
    documented = {name for module, name in members if "api" in module or "callbacks" in module}
    assert documented == {*megatrain.__all__, *megatrain.api.__all__} - {"__version__"}

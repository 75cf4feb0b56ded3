"""T5 from transformers and back: weights, keys and special ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.errors import CheckpointError
from megatrain.inference.loading import load_decoder
from megatrain.model.encoder_decoder import EncoderDecoder
from megatrain.train.convert import export_checkpoint, import_folder

SIZES = {"vocab_size": 131, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
INPUTS = torch.randint(2, 131, (2, 30), generator=torch.Generator().manual_seed(1))


def saved(folder: Path, **changes: Any) -> T5ForConditionalGeneration:
    """A T5 v1.1 whose head is not its embedding, as a folder of transformers; ``changes``: of its config.json."""
    torch.manual_seed(3)
    kind = {"num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**SIZES, **IDS, **kind))
    if not changes.get("tie_word_embeddings"):
        model.lm_head.weight = torch.nn.Parameter(torch.empty(131, 32))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 else noise)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    loaded: T5ForConditionalGeneration = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return loaded


def logits(folder: Path, inputs: torch.Tensor = INPUTS) -> torch.Tensor:
    model = load_decoder(CheckpointReader(folder))
    assert isinstance(model, EncoderDecoder)
    with torch.no_grad():
        return model.logits(inputs, inputs.flip(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "scale_decoder_outputs": True},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    ],
    ids=["head", "tied", "tied, not scaled"],
)
def test_an_imported_t5_goes_back_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = theirs(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits
    torch.testing.assert_close(logits(tmp_path / "checkpoint"), expected, atol=1e-5, rtol=1e-5)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits, expected)
    stored = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("hf", "back")]
    assert stored[0] == stored[1]
    assert ("lm_head.weight" in stored[1]) == (not changes)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written == json.loads((tmp_path / "hf/config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'; only 'gated-gelu' can be imported"),
        ({"is_decoder": True}, "a T5 of an encoder or a decoder alone"),
    ],
    ids=["v1.0", "decoder"],
)
def test_another_t5_is_refused_by_its_key(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=reason):
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")


def test_adapters_of_both_stacks_reach_peft(tmp_path: Path) -> None:
    """What is adapted has one name in both stacks (q), or another number in each (wi_0)."""
    base = saved(tmp_path / "base")
    import_folder(tmp_path / "base", tmp_path / "checkpoint")
    adapted = get_peft_model(base, LoraConfig(r=6, lora_alpha=21, target_modules=["q", "wi_0", "wo"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        expected = adapted(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits
    import_folder(tmp_path / "peft", tmp_path / "adapters", tmp_path / "checkpoint")
    torch.testing.assert_close(logits(tmp_path / "adapters"), expected, atol=1e-5, rtol=1e-5)
    export_checkpoint(tmp_path / "adapters", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "out"))
    assert len(after) == 2 * (3 * 3 + 2 * 4)  # with q of cross-attention
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    export_checkpoint(tmp_path / "adapters", tmp_path / "merged", merge=True)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        for model in (PeftModel.from_pretrained(again, tmp_path / "out").eval(), merged):
            found = model(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

"""Marian from transformers and back: weights, keys and special ids, with one vocabulary and with two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, MarianConfig, MarianMTModel

from megatrain.errors import CheckpointError
from megatrain.train.convert import export_checkpoint, import_folder
from tests.unit.train.test_convert_t5 import logits

SIZES = {"vocab_size": 131, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
SIZES |= {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
INPUTS = torch.randint(2, 131, (2, 30), generator=torch.Generator().manual_seed(1))
TWO = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 140}


def saved(folder: Path, **changes: Any) -> MarianMTModel:
    """A Marian as a folder of transformers, with a bias of its logits."""
    torch.manual_seed(3)
    model = MarianMTModel(MarianConfig(**{**SIZES, **IDS, "dropout": 0.0, **changes}))
    varied = [x for name, x in model.named_parameters() if "embed_positions" not in name]
    with torch.no_grad():
        for parameter in [*varied, model.final_logits_bias]:
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(noise + 1.0 if parameter.dim() == 1 else noise)
    model.save_pretrained(folder)
    loaded: MarianMTModel = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return loaded


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale_embedding": True, "activation_function": "relu"},
        {"activation_function": "swish", **TWO},
        {"tie_word_embeddings": False, **TWO},
    ],
    ids=["shared", "the paper's", "two vocabularies", "untied"],
)
def test_an_imported_marian_goes_back_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved(tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = theirs(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits
    torch.testing.assert_close(logits(tmp_path / "checkpoint", INPUTS), expected, atol=1e-5, rtol=1e-5)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits, expected)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written == json.loads((tmp_path / "hf/config.json").read_text())


def test_positions_and_second_names_are_accepted(tmp_path: Path) -> None:
    """As older versions of transformers saved them."""
    theirs = saved(tmp_path / "hf")
    state = {name: x.clone() for name, x in theirs.state_dict().items()}
    assert {"model.encoder.embed_positions.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"} <= set(state)
    save_file(state, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = theirs(input_ids=INPUTS, decoder_input_ids=INPUTS.flip(1)).logits
    torch.testing.assert_close(logits(tmp_path / "checkpoint", INPUTS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_function": "tanh"}, "activation_function: Input should be 'gelu', 'relu' or 'swish'"),
        ({"decoder_ffn_dim": 64}, "encoder_ffn_dim and decoder_ffn_dim differ"),
        ({"activation_dropout": 0.1}, "activation_dropout is 0.1; only 0.0 can be imported"),
        ({"tie_word_embeddings": False}, "shares no embedding of a marian then"),
        ({"decoder_vocab_size": 140}, "decoder_vocab_size"),
    ],
    ids=["activation", "widths", "dropout", "untied", "vocabularies"],
)
def test_another_marian_is_refused_by_its_key(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=reason):
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")

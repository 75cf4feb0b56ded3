"""Hugging Face folders, both ways, with transformers itself as the judge."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megatrain.checkpoint import huggingface
from megatrain.checkpoint.reader import check_files
from megatrain.errors import CheckpointError
from megatrain.train.convert import export_checkpoint, import_folder
from megatrain.train.inference import load_decoder
from tests.runs import TinyData

LLAMA = LlamaConfig(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
GPT2 = GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=64)


def save(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def model_of(family: str, *, tied: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    config, kind = (LLAMA, LlamaForCausalLM) if family == "llama" else (GPT2, GPT2LMHeadModel)
    config.tie_word_embeddings = tied
    model = kind(config)
    for parameter in model.parameters():  # biases and norms, too, unlike any default
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_imported_model_has_the_logits_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = model_of(family, tied=tied)
    import_folder(save(theirs, tmp_path / "hf"), tmp_path / "checkpoint")
    assert [problem for _, problem in check_files(tmp_path / "checkpoint")] == [None]
    ours, _, _ = load_decoder(tmp_path / "checkpoint")
    tokens = torch.randint(0, 131, (2, 40))
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        logits = ours.logits(tokens, ours.make_context(positions, None, None, torch.float32))
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_export_of_an_import_is_the_same_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)  # several files and an index
    theirs = model_of(family, tied=True, dtype=dtype)
    import_folder(save(theirs, tmp_path / "hf", max_shard_size="30KB"), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert {n for f in (tmp_path / "hf").glob("*.safetensors") for n in load_file(f)} == {
        n for f in (tmp_path / "back").glob("*.safetensors") for n in load_file(f)
    }
    for key, value in theirs.config.to_dict().items():
        if key.startswith(
            ("n_", "hidden", "num_", "rope", "max_", "vocab", "tie", "rms", "layer_norm", "intermediate")
        ):
            assert again.config.to_dict()[key] == value or key in {"n_inner"}, key


def test_exported_tokenizer_encodes_and_decodes_as_ours(tiny_data: TinyData, tmp_path: Path) -> None:
    import_folder(save(model_of("llama", tied=True), tmp_path / "hf"), tmp_path / "plain")
    shutil.copy(tiny_data.tokenizer, tmp_path / "hf" / "tokenizer.json")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "def f(x):\n    return 'é 😀' + x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"


def test_what_is_no_model_is_refused_with_its_reason(tmp_path: Path) -> None:
    hf = save(model_of("llama", tied=True), tmp_path / "hf")
    for name, change, words in [
        ("nothing", lambda f: (f / "config.json").unlink(), "no config.json"),
        ("weights", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        ("family", lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
        ("torn", lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "cannot be read"),
    ]:
        broken = shutil.copytree(hf, tmp_path / name)
        change(broken)
        with pytest.raises(CheckpointError, match=words):
            import_folder(broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))


def test_pickled_weights_are_refused_and_not_loaded(tmp_path: Path) -> None:
    hf = save(model_of("gpt2", tied=True), tmp_path / "hf")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        import_folder(hf, tmp_path / "out")

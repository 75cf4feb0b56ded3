"""Hugging Face folders, both ways, with transformers itself as the judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatrain.checkpoint.reader import CheckpointReader, check_files
from megatrain.checkpoint.transformers_config import (
    from_transformers,
    laid_over,
    not_in_transformers,
    to_transformers,
)
from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError
from megatrain.inference.assets import Assets
from megatrain.inference.loading import load_decoder
from megatrain.train.convert import export_checkpoint, import_folder
from tests.in_process import Ended
from tests.runs import TinyData

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DROPOUTS: dict[str, Any] = {"attn_pdrop": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3}
MODELS: dict[str, tuple[Any, type[torch.nn.Module]]] = {
    "llama": (LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, attention_dropout=0.1), LlamaForCausalLM),
    "mistral": (MistralConfig(**SIZES, sliding_window=9), MistralForCausalLM),
    "qwen2": (Qwen2Config(**SIZES), Qwen2ForCausalLM),
    "qwen3": (Qwen3Config(**SIZES, head_dim=24), Qwen3ForCausalLM),
    "bert": (BertConfig(**SIZES, type_vocab_size=3), BertForMaskedLM),
    "gpt2": (GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=64, **DROPOUTS), GPT2LMHeadModel),
}


def save(model: torch.nn.Module, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def model_of(family: str, *, tied: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    config, kind = MODELS[family]
    config.tie_word_embeddings = tied
    model = kind(config)
    for parameter in model.parameters():  # biases and norms, too, unlike any default
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_imported_model_has_the_logits_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    theirs = model_of(family, tied=tied)
    import_folder(save(theirs, tmp_path / "hf"), tmp_path / "checkpoint")
    assert {problem for _, problem in check_files(tmp_path / "checkpoint")} == {None}
    ours = load_decoder(CheckpointReader(tmp_path / "checkpoint"))
    tokens = torch.randint(0, 131, (2, 60))
    positions = torch.arange(60).expand(2, 60)
    with torch.no_grad():
        logits = ours.logits(tokens, ours.make_context(positions, None, None, torch.float32))
        expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_bert_is_read_under_its_old_names(tmp_path: Path) -> None:
    """With gamma and beta, positions as a buffer, the decoder's bias under both names, and the heads of pretraining."""
    theirs = model_of("bert", tied=True)
    folder = save(theirs, tmp_path / "hf")
    (folder / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}')
    import_folder(folder, tmp_path / "plain")
    assert CheckpointReader(tmp_path / "plain").saved.objective.masked_lm.mask_token == "<mask>"

    def with_old_names(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "LayerNorm" in name:
                end = "gamma" if name.endswith("weight") else "beta"
                tensors[f"{name.rpartition('.')[0]}.{end}"] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
        pretraining = BertForPreTraining(MODELS["bert"][0]).state_dict()
        heads = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight")
        tensors.update({name: pretraining[name].clone() for name in heads})

    change_weights(folder, with_old_names)
    import_folder(folder, tmp_path / "old")
    read = [load_decoder(CheckpointReader(tmp_path / name)).state_dict() for name in ("plain", "old")]
    assert all(torch.equal(tensor, read[1][name]) for name, tensor in read[0].items())
    export_checkpoint(tmp_path / "old", tmp_path / "back")
    assert "cls.predictions.bias" in stored(tmp_path / "back")
    assert not any("pooler" in name or "seq_relationship" in name for name in stored(tmp_path / "back"))


def test_a_classifier_of_texts_goes_both_ways(tmp_path: Path) -> None:
    """Of three kinds, by the sentence that each token is in."""
    torch.manual_seed(3)
    names = {0: "module", 1: "manual", 2: "mail"}
    keys = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    theirs = BertForSequenceClassification(BertConfig(**SIZES, **keys)).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    assert import_folder(save(theirs, tmp_path / "hf"), tmp_path / "checkpoint").notes == []
    reader = CheckpointReader(tmp_path / "checkpoint")
    assert Assets.of_checkpoint(reader).label_names == list(names.values())
    ours = load_decoder(reader)
    tokens, segments = torch.randint(0, 131, (2, 60)), torch.arange(60).expand(2, 60) // 40
    context = ours.make_context(torch.arange(60).expand(2, 60), None, None, torch.float32)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        logits = ours.logits(tokens, context._replace(segments_BT=segments))[:, 0]
        expected = theirs(tokens, token_type_ids=segments).logits
        assert torch.equal(again(tokens, token_type_ids=segments).logits, expected)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert stored(tmp_path / "back").keys() == stored(tmp_path / "hf").keys()
    assert config_of(tmp_path / "back") == config_of(tmp_path / "hf")


def test_a_bert_without_its_head_is_refused(tmp_path: Path) -> None:
    save(BertModel(MODELS["bert"][0]), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"lacks 5 of the model's tensors, among them cls.predictions.transform"):
        import_folder(tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_exporting_an_import_is_bit_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = model_of(family, tied=True, dtype=dtype)
    import_folder(save(theirs, tmp_path / "hf", max_shard_size="30KB"), tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert stored(tmp_path / "hf").keys() == stored(tmp_path / "back").keys()
    assert config_of(tmp_path / "back") == config_of(tmp_path / "hf")
    if dtype != torch.float32:
        return  # the model that was saved has rotary angles in half precision, which one that is loaded has not
    tokens = torch.randint(0, 131, (2, 60))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("given", "window"), [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 9}, 9)]
)
def test_mistrals_window_is_read_as_transformers_does(given: dict[str, Any], window: int | None) -> None:
    theirs = {**SIZES, "model_type": "mistral", "max_position_embeddings": 8192, **given}
    config = from_transformers(theirs, Path("config.json"))
    assert getattr(config, "sliding_window") == window == AutoConfig.for_model(**theirs).sliding_window  # noqa: B009
    assert to_transformers(config, "float32")["sliding_window"] == window


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: older versions of safetensors give views of the file, which tests write anew."""
    return {name: tensor.clone() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_weights_keep_their_type_whatever_config_json_says(tmp_path: Path) -> None:
    hf = save(model_of("llama", tied=False, dtype=torch.bfloat16), tmp_path / "hf")
    change_config(hf, dtype="float32")
    import_folder(hf, tmp_path / "one")
    export_checkpoint(tmp_path / "one", tmp_path / "back")
    assert {tensor.dtype for tensor in stored(tmp_path / "back").values()} == {torch.bfloat16}

    exact = torch.linspace(0.1, 1.0, 32)  # not in bf16
    change_weights(hf, lambda tensors: tensors.update({"model.norm.weight": exact}))
    import_folder(hf, tmp_path / "two")
    export_checkpoint(tmp_path / "two", tmp_path / "mixed")
    mixed = stored(tmp_path / "mixed")
    assert torch.equal(mixed["model.norm.weight"], exact)
    assert all(torch.equal(tensor.float(), mixed[name]) for name, tensor in stored(hf).items())


@pytest.mark.parametrize("head", ["equal", "the only copy"])
def test_a_head_that_is_the_embedding_stays_tied(head: str, tmp_path: Path) -> None:
    hf = save(model_of("llama", tied=True), tmp_path / "hf")
    embedding = stored(hf)["model.embed_tokens.weight"]
    change_weights(hf, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    if head == "the only copy":
        change_weights(hf, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert import_folder(hf, tmp_path / "checkpoint").notes == []
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert "lm_head.weight" not in stored(tmp_path / "back")
    assert torch.equal(stored(tmp_path / "back")["model.embed_tokens.weight"], embedding)


def test_a_head_of_its_own_is_imported_untied(tmp_path: Path) -> None:
    hf = save(model_of("gpt2", tied=True), tmp_path / "hf")
    change_weights(hf, lambda tensors: tensors.update({"lm_head.weight": torch.ones(131, 32)}))
    assert "they are not tied" in import_folder(hf, tmp_path / "checkpoint").notes[0]
    model = CheckpointReader(tmp_path / "checkpoint").saved.model
    assert (model.attention_dropout, model.hidden_dropout) == (0.1, 0.2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert torch.equal(stored(tmp_path / "back")["lm_head.weight"], torch.ones(131, 32))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False


def test_model_safetensors_comes_before_an_index(tmp_path: Path) -> None:
    hf = save(model_of("llama", tied=True), tmp_path / "hf")
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    import_folder(hf, tmp_path / "checkpoint")


SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"hidden_size": 32},
    "no multiple of the heads": {"hidden_size": 30, "head_dim": 8},
    "wide initial weights": {"hidden_size": 32, "initializer_range": 1.5},
}


@pytest.mark.parametrize("family", [name for name in MODELS if name not in ("gpt2", "bert")])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_transformers_does_not_load_is_said(shape: str, family: str) -> None:
    keys = {**SIZES, "num_hidden_layers": 1, **SHAPES[shape], "family": family}
    model = ModelConfig.model_validate(keys)
    try:
        AutoConfig.for_model(**to_transformers(model, "float32"))
    except Exception:  # noqa: BLE001 - pydantic's kind of huggingface_hub, or ValueError
        assert "transformers 5 does not load" in not_in_transformers(model)[0]
    else:
        assert not_in_transformers(model) == []


def test_exported_tokenizer_encodes_and_decodes_as_ours(tiny_data: TinyData, tmp_path: Path) -> None:
    save(model_of("llama", tied=True), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    change_config(tmp_path / "hf", bos_token_id=None, eos_token_id=0)
    shutil.copy(tiny_data.tokenizer, tmp_path / "hf" / "tokenizer.json")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "def f(x):\n    return 'é 😀' + x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token) == (None, None, None)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert not (tmp_path / "back" / "generation_config.json").exists()


def test_how_to_tokenize_and_generate_goes_through_unchanged(tiny_data: TinyData, tmp_path: Path) -> None:
    hf = save(model_of("qwen3", tied=True), tmp_path / "hf")
    shutil.copy(tiny_data.tokenizer, hf / "tokenizer.json")
    own = {"generation_config.json": {"eos_token_id": [7, 9], "bos_token_id": 5, "temperature": 0.6}}
    own |= {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}}
    for name, content in own.items():
        (hf / name).write_text(json.dumps(content))
    import_folder(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    for name in ("tokenizer.json", *own):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads((hf / "config.json").read_text())


def test_a_foreign_tokenizer_does_not_stop_exports(tmp_path: Path) -> None:
    hf = save(model_of("llama", tied=True), tmp_path / "hf")
    (hf / "generation_config.json").unlink()
    (hf / "tokenizer.json").write_text('{"added_tokens": [1, {"special": true}]}')
    import_folder(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5e\nsize 2000000\n"


def missing_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save(model, folder, max_shard_size="20KB")
    next(folder.glob("model-00001-*")).unlink()


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": ("llama", lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": ("llama", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "another family": ("llama", lambda f: change_config(f, model_type="roberta"), "'roberta'"),
    "torn": ("llama", lambda f: os.truncate(f / "model.safetensors", 60_000), "cannot be read as safetensors"),
    "no size": (
        "llama",
        lambda f: (f / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}'),
        "lacks intermediate_size, num_hidden_layers, num_attention_heads, vocab_size",
    ),
    "no vocabulary": ("llama", lambda f: change_config(f, vocab_size=None), "lacks vocab_size"),
    "more layers than weights": (
        "llama",
        lambda f: change_config(f, num_hidden_layers=10**7),
        "too few for the .* parameters that config.json describes",
    ),
    "bias": ("llama", lambda f: change_config(f, attention_bias=True), "attention_bias is True"),
    "activation": ("mistral", lambda f: change_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "rope": (
        "qwen3",
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        "scaled by 'yarn'; default, linear, llama3",
    ),
    "old rope": ("llama", lambda f: change_config(f, rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'"),
    "unknown rope key": (
        "llama",
        lambda f: change_config(f, rope_scaling={"type": "linear", "factor": 2.0, "attention_factor": 1.1}),
        "rope_scaling.attention_factor",
    ),
    "partly rotated": ("llama", lambda f: change_config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "quantized": (
        "llama",
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized",
    ),
    "window of qwen3": (
        "qwen3",
        lambda f: change_config(
            f, use_sliding_window=True, sliding_window=16, layer_types=["full_attention", "sliding_attention"]
        ),
        "a window of 16 tokens",
    ),
    "window of qwen2": (
        "qwen2",
        lambda f: change_config(f, use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=None),
        "a window of 16 tokens",
    ),
    "a window that is no number": ("mistral", lambda f: change_config(f, sliding_window="wide"), "sliding_window: "),
    "rope that is no table": ("llama", lambda f: change_config(f, rope_scaling="twice"), "of the wrong type"),
    "layer types": ("qwen3", lambda f: change_config(f, layer_types=["full_attention", "linear_attention"]), "layer_t"),
    "a tensor more": (
        "llama",
        lambda f: change_weights(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        "q_proj.bias is no tensor of the model",
    ),
    "a tensor twice": (
        "gpt2",
        lambda f: change_weights(f, lambda t: t.update({"ln_f.bias": torch.zeros(32)})),
        "has 1 of the model's tensors twice, among them transformer.ln_f.bias",
    ),
    "a tensor less": ("qwen3", lambda f: change_weights(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "another shape": (
        "llama",
        lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
        r"has shape \[31\]",
    ),
    "integers": (
        "llama",
        lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
        "of type I8",
    ),
    "a missing shard": (
        "llama",
        lambda f: missing_shard(f),
        r"model-00001-of-0000\d\.safetensors is missing: 1 of the \d files that model\.safetensors\.index\.json names",
    ),
    "a Git LFS pointer": ("llama", lambda f: (f / "model.safetensors").write_bytes(POINTER), "is a Git LFS pointer"),
    "a tokenizer that is a pointer": (
        "llama",
        lambda f: (f / "tokenizer.model").write_bytes(POINTER),
        r"tokenizer\.model is a Git LFS pointer",
    ),
    "a link to nowhere": (
        "llama",
        lambda f: (f / "tokenizer.json").symlink_to(f / "blobs" / "5e"),
        r"tokenizer\.json is a link to .*5e, which is not there",
    ),
    "rope of each kind of layer": (
        "qwen3",
        lambda f: change_config(f, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        "layers, each in its own way",
    ),
    "pickled": (
        "gpt2",
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "can run code",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_imports_are_refused_with_the_reason(what: str, tmp_path: Path) -> None:
    family, change, words = REFUSED[what]
    hf = save(model_of(family, tied=True), tmp_path / "hf")
    change(hf)
    with pytest.raises(CheckpointError, match=words):
        import_folder(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_refused_import_exits_4_with_a_paragraph(tmp_path: Path, run_megatrain: Callable[..., Ended]) -> None:
    hf = save(model_of("qwen3", tied=False), tmp_path / "hf")
    change_config(hf, use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2)
    ended = run_megatrain("import", hf, "--out", tmp_path / "out")
    assert ended.code == 4
    assert "sliding_window" in ended.err
    assert "Traceback" not in ended.err


MEASURE = """
import re, sys
from pathlib import Path
from megatrain.train.convert import export_checkpoint, import_folder
import megatrain.model.decoder
action, source, target, shard_bytes = sys.argv[1:]
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
if action == "import":
    import_folder(Path(source), Path(target))
else:
    export_checkpoint(Path(source), Path(target), int(shard_bytes))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.acceptance
def test_exporting_takes_a_fraction_of_the_model_memory(tmp_path: Path) -> None:
    """A model of 0.7 GB, the largest tensor of which has 34 MB: what the process grows by, mapped pages included."""
    keys = {**SIZES, "hidden_size": 2048, "intermediate_size": 4096, "vocab_size": 4096, "num_hidden_layers": 4}
    config = LlamaConfig(**keys | {"num_attention_heads": 16, "num_key_value_heads": 16})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert model_bytes > 0.6e9
    save(model, tmp_path / "hf", max_shard_size="200MB")
    del model

    def peak(action: str, source: str, target: str) -> int:
        command = [sys.executable, "-c", MEASURE, action, str(tmp_path / source), str(tmp_path / target), "200000000"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    peak("import", "hf", "checkpoint")
    shutil.rmtree(tmp_path / "hf")
    grown = peak("export", "checkpoint", "back")
    assert grown < model_bytes / 2, f"{grown / 1e6:.0f} MB for a model of {model_bytes / 1e6:.0f} MB"


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_an_export_of_longer_context_has_no_window(kind: type[Qwen2Config | Qwen3Config]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0, "max_position_embeddings": 32}
    theirs = kind(**{**SIZES, **window}).to_dict()
    config = from_transformers(theirs, Path("config.json"))  # the window is no shorter than the context
    longer = config.model_copy(update={"max_position_embeddings": 256})
    exported = laid_over(theirs, longer, "float32")
    assert set(kind(**exported).layer_types) == {"full_attention"}
    assert from_transformers(exported, Path("config.json")) == longer


def test_a_mistral_with_full_attention_is_refused() -> None:
    theirs = {**MistralConfig(**SIZES, sliding_window=7).to_dict(), "layer_types": ["full_attention"] * 2}
    with pytest.raises(CheckpointError, match="layer_types has 'full_attention'"):
        from_transformers(theirs, Path("config.json"))
    assert from_transformers({**theirs, "sliding_window": None}, Path("config.json")).family == "mistral"

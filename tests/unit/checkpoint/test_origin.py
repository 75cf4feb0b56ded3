"""What a run may begin from, and where `model: from_checkpoint` takes the model from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_samples import manifest

from megatrain.checkpoint.location import locate
from megatrain.checkpoint.manifest import MANIFEST, FileEntry
from megatrain.checkpoint.origin import MAY_DIFFER, Origin, find_origin, load, may_differ_table
from megatrain.checkpoint.store import add_file
from megatrain.config import ModelConfig, RunConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.plan.flops import num_parameters

SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA: dict[str, Any] = {
    "family": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "rope_theta": 5e5,
    "rope_scaling": {**SCALING, "original_max_position_embeddings": 32},
}
GPT2 = {"family": "gpt2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
BERT, T5 = {**GPT2, "family": "bert"}, {**GPT2, "family": "t5"}
MARIAN = {**GPT2, "family": "marian", "share_encoder_decoder_embeddings": False}
VIT = {**GPT2, "family": "vit", "image_size": 32, "patch_size": 8, "tie_word_embeddings": False}
OTHERS: dict[str, Any] = {
    "family": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "vocab_size": 513,
    "rms_norm_eps": 1.0,
    "layer_norm_epsilon": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "attention": "math",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "initializer_range": 0.1,
    "init_scheme": "depth",
    "type_vocab_size": 4,
    "num_decoder_layers": 5,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 64,
    "scale_decoder_outputs": True,
    "activation_function": "relu",
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "decoder_vocab_size": 500,
    "image_size": 64,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 3,
}
OF_OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "layer_norm_epsilon": GPT2,
    "sliding_window": {**LLAMA, "family": "mistral"},
    **dict.fromkeys(("type_vocab_size", "num_labels"), BERT),
    **dict.fromkeys(("num_decoder_layers", "scale_decoder_outputs"), T5),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), T5),
    **dict.fromkeys(("activation_function", "scale_embedding"), MARIAN),
    **dict.fromkeys(("share_encoder_decoder_embeddings", "decoder_vocab_size"), MARIAN),
    **dict.fromkeys(("image_size", "patch_size", "num_channels"), VIT),
}


def checkpoint(folder: Path, model: dict[str, Any], step: int = 7, tokenizer: bytes | None = None) -> Path:
    """A checkpoint without its pieces: nothing here reads them."""
    folder.mkdir(parents=True)
    entries = [FileEntry(file="rank-00000.safetensors", bytes=10**7, checksum="")]
    entries += [add_file(folder, "tokenizer.json", tokenizer)] if tokenizer else []
    with (folder / "rank-00000.safetensors").open("wb") as file:
        file.truncate(10**7)
    full = ModelConfig.model_validate(model)
    config = {"model": full.model_dump(mode="json"), "data": {"seq_len": 64, "document_mask": False}}
    facts = {"config": {**config, "train": {"precision": "fp32"}}, "parameters": num_parameters(full)}
    (folder / MANIFEST).write_bytes(manifest(step, entries).model_copy(update=facts).encode())
    return folder


def write_config(path: Path, model: Any, init_from: Path | None) -> Path:
    run = {"dir": str(path.parent / "run"), "init_from": str(init_from) if init_from else None}
    train = {"steps": 5, "global_batch_size": 2}
    data: dict[str, Any] = {"train": [{"path": "data/x"}], "seq_len": 64}
    if isinstance(model, dict) and model["family"] == "bert":
        data |= {"packing": "best_fit", "document_mask": True}
    elif isinstance(model, dict) and model["family"] == "vit":
        data["seq_len"] = ModelConfig.model_validate(model).num_places
    path.write_text(
        yaml.safe_dump({"run": run, "model": model, "data": data, "train": train, "optimizer": {"lr": 0.1}})
    )
    return path


def begin(tmp_path: Path, saved: dict[str, Any], model: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path / "step-00000007", saved)
    origin = find_origin(load(write_config(tmp_path / "c.yaml", model, folder)))
    assert origin is not None
    origin.refuse_other_model(ModelConfig.model_validate(model))


@pytest.mark.parametrize("key", ModelConfig.model_fields)
def test_each_key_may_differ_or_is_refused(key: str, tmp_path: Path) -> None:
    saved = OF_OTHER_FAMILIES.get(key, LLAMA)
    other = {**saved, key: OTHERS[key]}
    if key in MAY_DIFFER and key != "max_position_embeddings":
        return begin(tmp_path, saved, other)
    with pytest.raises(CheckpointError, match=rf"model\.{key} is .* there and .* here"):
        begin(tmp_path, saved, other)
    return None


def test_layers_of_a_decoder_may_be_left_out(tmp_path: Path) -> None:
    """As many as the encoder has, which an import writes out."""
    begin(tmp_path, {**T5, "num_decoder_layers": 2}, T5)


def test_a_context_may_be_longer_but_for_gpt2(tmp_path: Path) -> None:
    begin(tmp_path / "llama", LLAMA, {**LLAMA, "max_position_embeddings": 4096})
    with pytest.raises(CheckpointError, match=r"max_position_embeddings is 256 there and 512 here"):
        begin(tmp_path / "gpt2", GPT2, {**GPT2, "max_position_embeddings": 512})


def test_all_differences_are_named_with_both_values(tmp_path: Path) -> None:
    other = {key: value for key, value in LLAMA.items() if key not in ("tie_word_embeddings", "rope_theta")}
    scaling = {**LLAMA["rope_scaling"], "factor": 4.0}
    with pytest.raises(CheckpointError) as refused:
        begin(tmp_path, LLAMA, {**other, "rope_scaling": scaling})
    for words in (
        "model.tie_word_embeddings is false there and true here",
        "model.rope_theta is 500000.0 there and 10000.0 here",
        "model.rope_scaling.factor is 8.0 there and 4.0 here",
    ):
        assert words in str(refused.value)


def test_sizes_left_to_the_family_compare_equal(tmp_path: Path) -> None:
    begin(tmp_path, {**GPT2, "intermediate_size": 256, "head_dim": 16}, {**GPT2, "num_key_value_heads": 4})


def test_tensors_too_many_are_refused(tmp_path: Path) -> None:
    model = ModelConfig.model_validate(LLAMA)
    more = manifest(1, []).model_copy(update={"parameters": num_parameters(model) + 512 * 64})
    with pytest.raises(CheckpointError, match="tensors too many or too few"):
        Origin(tmp_path, more, model).refuse_other_model(model)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000007", LLAMA, tokenizer=b"theirs")
    origin = find_origin(load(write_config(tmp_path / "c.yaml", LLAMA, folder)))
    assert origin is not None
    origin.refuse_other_tokenizer("data/x", b"theirs")
    with pytest.raises(CheckpointError, match="data/x was tokenized with another tokenizer"):
        origin.refuse_other_tokenizer("data/x", b"ours")


def test_a_run_with_checkpoints_has_no_origin(tmp_path: Path) -> None:
    config = load(write_config(tmp_path / "c.yaml", LLAMA, tmp_path / "gone"))
    checkpoint(tmp_path / "run" / "checkpoints" / "step-00000007", LLAMA)
    assert find_origin(config) is None


def test_the_model_comes_from_a_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000007", LLAMA)
    config = write_config(tmp_path / "c.yaml", "from_checkpoint", folder)
    assert load(config).model == ModelConfig.model_validate(LLAMA)
    longer = load(config, ["model.max_position_embeddings=4096", "model.rope_scaling.factor=2.0", "train.steps=9"])
    assert (longer.model.max_position_embeddings, longer.train.steps) == (4096, 9)
    assert longer.model.rope_scaling is not None and longer.model.rope_scaling.factor == 2.0


def test_it_is_set_on_the_command_line_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step-00000007", LLAMA)
    config = write_config(tmp_path / "c.yaml", GPT2, None)
    loaded = load(config, ["model.attention_dropout=0.5", "model=from_checkpoint", f"run.init_from={folder}"])
    assert loaded.model == ModelConfig.model_validate({**LLAMA, "attention_dropout": 0.5})


def test_the_runs_own_newest_checkpoint_comes_first(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", "from_checkpoint", tmp_path / "gone")
    for step, dropout in ((2, 0.1), (10, 0.2)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        checkpoint(folder, {**LLAMA, "attention_dropout": dropout}, step)
    assert load(config).model.attention_dropout == 0.2
    (folder / MANIFEST).write_bytes(b"torn")
    assert load(config).model.attention_dropout == 0.1


@pytest.mark.parametrize("place", ["run.init_from", "run.dir", "checkpoint.dir"])
def test_the_home_folder_is_known_before_the_model(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    below = "a/checkpoints" if place == "run.dir" else "a"
    checkpoint(tmp_path / below / "step-00000007", LLAMA)
    config = write_config(tmp_path / "c.yaml", "from_checkpoint", None)
    assert load(config, [f"{place}=~/a"]).model == ModelConfig.model_validate(LLAMA)
    assert locate("~/a") == tmp_path / "a"  # of a command's argument, in quotes


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="from_checkpoint given; there is no checkpoint yet"):
        load(write_config(tmp_path / "c.yaml", "from_checkpoint", None))
    with pytest.raises(CheckpointError, match=r"run\.init_from cannot be used: .*gone does not exist"):
        load(write_config(tmp_path / "c.yaml", "from_checkpoint", tmp_path / "gone"))
    config: RunConfig = load(write_config(tmp_path / "c.yaml", LLAMA, tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=r"run\.init_from cannot be used: .*gone does not exist"):
        find_origin(config)


def test_docs_have_the_table() -> None:
    assert may_differ_table() in Path("docs/resuming.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", [None, 10**7 - 1])
def test_an_origin_without_all_its_files_is_refused(left: int | None, tmp_path: Path) -> None:
    origin = checkpoint(tmp_path / "base" / "step-00000007", LLAMA)
    piece = origin / "rank-00000.safetensors"
    config = load(write_config(tmp_path / "run.yaml", LLAMA, origin))
    if left is None:
        piece.unlink()
    else:
        os.truncate(piece, left)
    with pytest.raises(CheckpointError, match=r"run\.init_from cannot be used: .*rank-00000\.safetensors"):
        find_origin(config)

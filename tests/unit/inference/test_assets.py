"""Special tokens and small files: from a folder or a dataset through checkpoints to an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from data_tools.tokenize import TokenizeOptions, tokenize
from data_tools.tokenizer import train_tokenizer
from data_tools.units import ReadOptions
from megatrain.checkpoint.manifest import MANIFEST, SpecialTokens, Token, read_manifest
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import ModelConfig
from megatrain.data import open_dataset
from megatrain.data.dataset import require_same_tokenizer
from megatrain.errors import DataError
from megatrain.families import FAMILIES
from megatrain.inference.assets import CARRIED, Assets, exported_files
from megatrain.inference.writer import TextSettings, generate_text
from megatrain.model.generate import Sampling
from megatrain.train.convert import export_checkpoint, import_folder
from megatrain.train.evaluation import evaluate_checkpoint
from tests.runs import Metrics, TinyData, tiny_config, write_config
from tests.served import ServedRanks
from tests.tiny_data import QUIET

SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|pad|>")
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL = ModelConfig(**SIZES, vocab_size=512)


@pytest.fixture(scope="module")
def ids(folder: Path) -> dict[str, int]:
    """Of the special tokens; the tokenizer's first one, `<|endoftext|>`, is none of them."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """A folder of the Llama 3 kind, with all that such a folder has."""
    hf = tmp_path_factory.mktemp("assets") / "hf"
    hf.mkdir()
    text = tiny_data.prose.parent / "prose.jsonl"
    train_tokenizer([str(text)], 512, hf / "tokenizer.json", ReadOptions(), SPECIAL)
    added = json.loads((hf / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    begin, end = ids["<|begin_of_text|>"], ids["<|eot_id|>"]
    config = LlamaConfig(**SIZES, vocab_size=512, max_position_embeddings=64, rope_theta=5e5, eos_token_id=end)
    config.bos_token_id = begin
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(hf)
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}, "pad_token": "<|pad|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}", **tokens}
    generation = {"bos_token_id": begin, "eos_token_id": [end], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    for name, value in (
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
        ("special_tokens_map.json", tokens),
    ):
        (hf / name).write_text(json.dumps(value))
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "tokenizer.model").write_bytes(b"\x0a\x0bpieces")
    (hf / "README.md").write_text("# A model")
    (hf / "original").mkdir()
    return hf


def dataset(folder: Path, tiny_data: TinyData, out: Path, eod_token: str, bos_token: str | None = None) -> Path:
    text = str(tiny_data.prose.parent / "prose.jsonl")
    tokenize([text], folder / "tokenizer.json", out, TokenizeOptions(eod_token=eod_token, bos_token=bos_token), QUIET)
    return out


def run_config(tiny_data: TinyData, path: Path, run_dir: Path) -> dict[str, Any]:
    config = tiny_config(tiny_data, run_dir)
    return {**config, "data": {"train": [{"path": str(path)}], "seq_len": 64}}


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_left_out_are_those_of_transformers(family: str) -> None:
    theirs, absent = AutoConfig.for_model(family), FAMILIES[family].hugging_face.absent
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert absent.get(key) == getattr(theirs, key, None), key


def test_an_import_carries_all_and_says_what_not(folder: Path, ids: dict[str, int], tmp_path: Path) -> None:
    imported = import_folder(folder, tmp_path / "checkpoint")
    assert imported.notes == ["left out: README.md, original."]
    special = read_manifest(tmp_path / "checkpoint").special_tokens
    assert special is not None
    assert special.eod == Token(id=ids["<|eot_id|>"], token="<|eot_id|>")
    assert special.bos == Token(id=ids["<|begin_of_text|>"], token="<|begin_of_text|>")
    assert special.pad == Token(id=ids["<|pad|>"], token="<|pad|>")
    assert special.unk is None
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "back")
    kept = [name for name in CARRIED if (folder / name).exists()]
    assert len(kept) == 7
    for name in kept:
        same = read if name == "config.json" else Path.read_bytes
        assert same(tmp_path / "back" / name) == same(folder / name), name  # type: ignore[operator]


def test_an_imported_run_ends_texts_like_its_data(
    folder: Path, ids: dict[str, int], tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    import_folder(folder, tmp_path / "checkpoint")
    path = dataset(folder, tiny_data, tmp_path / "set", "<|end_of_text|>")
    config = {**run_config(tiny_data, path, tmp_path / "run"), "model": "from_checkpoint"}
    file = write_config(tmp_path / "run.yaml", config)
    two_ranks.finish(file, f"run.init_from={tmp_path / 'checkpoint'}", "train.steps=2")
    shutil.rmtree(tmp_path / "checkpoint")  # it is read at step 0 alone
    two_ranks.finish(file, f"run.init_from={tmp_path / 'checkpoint'}", "train.steps=3")
    assert Metrics.read(tmp_path / "run").steps == [1, 2, 3]
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    back, end = tmp_path / "back", ids["<|end_of_text|>"]
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end_of_text|>", "<|begin_of_text|>")
    generation = GenerationConfig.from_pretrained(back)
    assert (generation.eos_token_id, generation.temperature, generation.top_p) == (end, 0.6, 0.9)
    assert read(back / "config.json") == {**read(folder / "config.json"), "eos_token_id": end, "dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_an_export_names_only_the_data_end_token(
    folder: Path, ids: dict[str, int], tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path
) -> None:
    path = dataset(folder, tiny_data, tmp_path / "set", "<|end_of_text|>")
    config = run_config(tiny_data, path, tmp_path / "run")
    two_ranks.finish(write_config(tmp_path / "run.yaml", config), "train.steps=2")
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    end = ids["<|end_of_text|>"]
    written = read(tmp_path / "back" / "config.json")
    assert [written[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [None, end, None]
    assert read(tmp_path / "back" / "generation_config.json") == {"eos_token_id": end}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.special_tokens_map == {"eos_token": "<|end_of_text|>"}
    assert set(tokenizer("a text")) == {"input_ids", "attention_mask"}
    for borders, words in (
        (["<|eot_id|>"], r"<\|eot_id\|> .* ended with"),
        ([SPECIAL[2], SPECIAL[0]], "begins them with"),
    ):
        other = dataset(folder, tiny_data, tmp_path / borders[0][2:5], *borders)
        with pytest.raises(DataError, match=words):
            evaluate_checkpoint(tmp_path / "run", other, show_progress=False)


def test_datasets_of_one_run_end_documents_alike(folder: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    sets = [open_dataset(dataset(folder, tiny_data, tmp_path / token[2:5], token)) for token in SPECIAL[1:3]]
    require_same_tokenizer([sets[0], sets[0]])
    with pytest.raises(DataError, match=r"<\|end_of_text\|> .* and .* <\|eot_id\|> .* one kind of document"):
        require_same_tokenizer(sets)
    begun = open_dataset(dataset(folder, tiny_data, tmp_path / "bos", SPECIAL[1], SPECIAL[0]))
    with pytest.raises(DataError, match=r"begins them with <\|begin_of_text\|>"):
        require_same_tokenizer([begun, sets[0]])


def test_generation_stops_where_the_folder_says(folder: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    shutil.copytree(folder, hf)

    def text(ends: list[int]) -> str:
        (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": ends or None}))
        (hf / "config.json").write_text(json.dumps({**read(folder / "config.json"), "eos_token_id": None}))
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        import_folder(hf, tmp_path / "checkpoint")
        settings = TextSettings(12, Sampling(2.0), seed=3)
        return "".join(generate_text(tmp_path / "checkpoint", "The", settings, warn=pytest.fail))

    (hf / "tokenizer_config.json").unlink()
    (hf / "special_tokens_map.json").unlink()
    assert text([]).startswith("The")
    assert len(text([])) > len("The")
    assert text(list(range(512))) == "The"


KINDS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {  # eod, bos, pad, unk
    "llama by default": ({"config.json": {"model_type": "llama"}}, (2, 1, None, None)),
    "qwen3 by default": ({"config.json": {"model_type": "qwen3"}}, (None, None, None, None)),
    "gpt2 of few tokens": ({"config.json": {"model_type": "gpt2", "vocab_size": 512}}, (None, None, None, None)),
    "null is none": ({"config.json": {"model_type": "llama", "eos_token_id": None}}, (None, 1, None, None)),
    "generation first": (
        {"config.json": {"model_type": "llama", "eos_token_id": 3}, "generation_config.json": {"eos_token_id": [5, 4]}},
        (5, 1, None, None),
    ),
    "nonsense": ({"config.json": {"model_type": "qwen3", "eos_token_id": "x", "bos_token_id": True}}, (None,) * 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_of_transformers(kind: str) -> None:
    files, expected = KINDS[kind]
    special = Assets.of_folder({name: json.dumps(value).encode() for name, value in files.items()}).special_tokens
    found = (special.eod, special.bos, special.pad, special.unk)
    assert tuple(token and token.id for token in found) == expected


def test_of_several_ends_the_tokenizers_is_taken(folder: Path, ids: dict[str, int]) -> None:
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    ends = [ids["<|end_of_text|>"], ids["<|eot_id|>"]]
    files["generation_config.json"] = json.dumps({"eos_token_id": ends}).encode()
    assets = Assets.of_folder(files)
    assert assets.special_tokens.eod == Token(id=ids["<|eot_id|>"], token="<|eot_id|>")
    assert assets.stop_ids == ends
    other = assets.with_data(files["tokenizer.json"], Token(id=0, token="<|endoftext|>"), Token(id=4, token="<s>"))
    assert other.stop_ids == [0]
    assert other.special_tokens.bos == Token(id=4, token="<s>")


def test_a_prompt_begins_as_documents_do(folder: Path, ids: dict[str, int]) -> None:
    begin = ids["<|begin_of_text|>"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = tokenizer.to_str().encode()
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])
    tokenizer.post_processor = template
    begun = tokenizer.to_str().encode()
    named = json.dumps({"bos_token": "<|begin_of_text|>"}).encode()
    asked = json.dumps({"bos_token": "<|begin_of_text|>", "add_bos_token": True}).encode()
    of = Assets.of_folder
    assert of({"tokenizer.json": plain, "tokenizer_config.json": named}).prompt_ids == []
    assert of({"tokenizer.json": begun, "tokenizer_config.json": named}).prompt_ids == [begin]
    assert of({"tokenizer.json": plain, "tokenizer_config.json": asked}).prompt_ids == [begin]
    imported = of({"tokenizer.json": begun, "tokenizer_config.json": named})
    end = Token(id=0, token="<|endoftext|>")
    assert imported.with_data(begun, end).prompt_ids == []
    assert imported.with_data(begun, end, imported.special_tokens.bos).prompt_ids == [begin]
    assert imported.notes == []
    other = exported_files(imported.with_data(begun, end, Token(id=4, token="<|pad|>")), MODEL, "float32")
    assert json.loads(other["config.json"])["bos_token_id"] == 4
    assert json.loads(other["tokenizer_config.json"])["bos_token"] == "<|pad|>"
    assert "prompts need it" in of({}).with_data(plain, end, imported.special_tokens.bos).notes[0]


def test_a_tokenizer_of_unknown_origin_exports_no_files() -> None:
    files = {"vocab.json": b"{}", "merges.txt": b"", "generation_config.json": b"{}"}
    assets = Assets.of_folder(files).with_data(b"{}", Token(id=0, token="x"))
    assert set(assets.files) == {"generation_config.json", "tokenizer.json"}


def test_a_checkpoint_of_an_older_version_still_ends(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000006"
    shutil.copytree(finished_run / "checkpoints" / "step-00000006", folder)
    manifest = read_manifest(folder)
    assert manifest.special_tokens == SpecialTokens(eod=Token(id=0, token="<|endoftext|>"))
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"special_tokens": None}).encode())
    assert Assets.of_checkpoint(CheckpointReader(folder)).stop_ids == [0]

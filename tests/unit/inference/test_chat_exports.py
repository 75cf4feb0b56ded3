"""A chat model ends its turns: reloaded here, exported, merged, and in transformers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import megatrain
from megatrain.checkpoint.manifest import Token
from megatrain.config import ModelConfig
from megatrain.inference.assets import Assets, exported_files
from megatrain.inference.writer import TextSettings, open_writer
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.train.convert import export_checkpoint, import_folder
from tests.tokenizer_samples import llama3

TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|eot_id|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
ASKED = [{"role": "user", "content": "to be?"}]


def tokenizer_folder(folder: Path, **tokens: str) -> dict[str, bytes]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama3(), **tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def ending_model(closer: int, vocab_size: int, folder: Path) -> Any:
    """A model whose likeliest token is always ``closer``."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.lm_head.weight[closer] = 1.0
    model.save_pretrained(folder)
    return model


def test_exports_of_chat_data_end_turns_and_documents(tmp_path: Path) -> None:
    """The closer is not what the tokenizer calls its end; then it is, and has a padding token beside it."""
    for tokens in ({"eos_token": "<|end_of_text|>"}, {"eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}):
        files = tokenizer_folder(tmp_path / tokens["eos_token"].strip("<|>"), **tokens)
        ids = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
        end, closer = ids["<|end_of_text|>"], ids["<|eot_id|>"]
        templates = {name: files[name] for name in ("tokenizer_config.json", "chat_template.jinja")}
        eod = Token(id=end, token="<|end_of_text|>")
        assets = Assets().with_data(files["tokenizer.json"], eod, template_files=templates)
        assert assets.stop_ids == [end, closer]
        model = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=closer + 1)
        written = exported_files(assets, model, "float32")
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        for name, content in written.items():
            (out / name).write_bytes(content)
        assert written["chat_template.jinja"] == files["chat_template.jinja"]
        generation, config = GenerationConfig.from_pretrained(out), json.loads(written["config.json"])
        assert generation.eos_token_id == config["eos_token_id"] == [end, closer]
        assert generation.pad_token_id == config["pad_token_id"] == (end if "pad_token" in tokens else None)
        tokenizer: Any = AutoTokenizer.from_pretrained(out)
        assert tokenizer.eos_token == tokens["eos_token"]
        assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_that_ends_its_turn_writes_nothing(merge: bool, tmp_path: Path) -> None:
    """Whatever is asked: in generate, eval and `load`, and in transformers from the exported folder alone."""
    files = tokenizer_folder(tmp_path / "hf", eos_token="<|end_of_text|>")
    ids = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    model = ending_model(ids["<|eot_id|>"], max(ids.values()) + 1, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    checkpoint = tmp_path / "checkpoint"
    if merge:
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
        import_folder(tmp_path / "peft", tmp_path / "adapters", checkpoint)
        checkpoint = tmp_path / "adapters"
    export_checkpoint(checkpoint, tmp_path / "out", merge=merge)
    for path in (checkpoint, tmp_path / "out"):
        assert megatrain.load(path).generate("to be", 5) == ""
        assert megatrain.load(path).generate([1, 2, 3], 5) == []
    writer, _ = open_writer(checkpoint)
    (written,) = writer.write([writer.chat_ids(ASKED)], TextSettings(5))
    assert (written.text, written.num_tokens, written.reason) == ("", 0, "stop")
    (tmp_path / "rows.jsonl").write_text('{"q": "to be?"}\n')
    (tmp_path / "tasks.yaml").write_text(
        f"[{{name: t, kind: generate, path: {tmp_path}/rows.jsonl, prompt: '{{{{ q }}}}', answer: x, chat: true}}]"
    )
    (result,) = evaluate_tasks(checkpoint, tmp_path / "tasks.yaml")
    assert result.outcomes[0].record["generated"] == ""
    (answered,) = pipeline("text-generation", str(tmp_path / "out"))(ASKED, max_new_tokens=5, do_sample=False)
    assert answered["generated_text"][-1] == {"role": "assistant", "content": ""}


def test_code_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    files = tokenizer_folder(tmp_path / "hf", eos_token="<|eot_id|>")
    ending_model(3, len(json.loads(files["tokenizer.json"])["model"]["vocab"]) + 3, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **code}))
    (tmp_path / "hf" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    imported = import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert "code.py" in imported.notes[0]
    megatrain.load(tmp_path / "hf")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "code.py").exists()
    assert not (tmp_path / "ran").exists()

"""A chat model ends its turns: reloaded here, exported, merged, and in transformers' own pipeline."""

from __future__ import annotations

import hashlib
import json
from datetime import date
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
from data_tools.conversations import Answers
from data_tools.tokenize import Effort, TokenizeOptions, tokenize
from data_tools.units import ReadOptions
from megatrain.checkpoint.huggingface import read_config
from megatrain.checkpoint.inspection import describe
from megatrain.checkpoint.manifest import Chat, Token
from megatrain.config import ModelConfig, RunConfig
from megatrain.data.chat import CLOCK
from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.assets import Assets, exported_files
from megatrain.inference.writer import TextSettings, open_writer
from megatrain.tasks.evaluation import evaluate_tasks
from megatrain.train import preview
from megatrain.train.convert import export_checkpoint, import_folder
from tests.tiny_data import silent
from tests.tokenizer_samples import llama3

TEMPLATE = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|eot_id|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
ASKED = [{"role": "user", "content": "to be?"}]
MODEL = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)


def tokenizer_folder(folder: Path, template: str = TEMPLATE, **tokens: str) -> dict[str, bytes]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama3(), **tokens)
    tokenizer.chat_template = template
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
        written = exported_files(assets, MODEL.model_copy(update={"vocab_size": closer + 1}), "float32")
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


def test_the_day_of_the_data_travels(tmp_path: Path) -> None:
    """From a dataset through checkpoints to an export and back; a run on plain text keeps it."""
    clock = "{{ strftime_now('%Y') }}" + TEMPLATE
    files = tokenizer_folder(tmp_path / "hf", clock, eos_token="<|eot_id|>")
    templates = {name: files[name] for name in ("tokenizer_config.json", "chat_template.jinja")}
    given, eod = files["tokenizer.json"], Token(id=0)
    for day in (CLOCK, date(2031, 5, 6)):
        assets = Assets().with_data(given, eod, template_files=templates, chat_date=day).with_data(given, eod)
        assert assets.template is not None and assets.chat is not None
        assert assets.template.render(ASKED).startswith(str(day.year))
        assert assets.chat == Chat(template_sha256=hashlib.sha256(clock.encode()).hexdigest(), date=day)
        written = exported_files(assets, MODEL, "float32")
        assert (written["tokenizer_config.json"] == files["tokenizer_config.json"]) == (day == CLOCK)
        assert any(str(day) in note for note in assets.notes)
        for name, content in written.items():
            (tmp_path / "hf" / name).write_bytes(content)
        AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
        for folder in ("hf", "saved"):
            back = Assets.of_folder({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
            assert back.chat == assets.chat
    plain = Assets().with_data(given, eod, template_files=tokenizer_folder(tmp_path / "plain", eos_token="<|eot_id|>"))
    assert plain.chat is not None and plain.chat.date is None and plain.notes == []


def test_another_template_than_the_models_is_told(tmp_path: Path) -> None:
    files = tokenizer_folder(tmp_path / "hf", eos_token="<|eot_id|>")
    ending_model(3, Tokenizer(files["tokenizer.json"], "tokenizer.json").vocab_size, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint")
    assert describe(tmp_path / "checkpoint")["chat"] == {
        "template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
        "date": None,
    }
    tokenizer_folder(tmp_path / "other", "{{ strftime_now('%Y') }}" + TEMPLATE, eos_token="<|eot_id|>")
    talk = [*ASKED, {"role": "assistant", "content": "or not"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}))
    for name, folder, day in (("same", "hf", None), ("new", "other", None), ("old", "other", "1999-01-02")):
        answers = Answers(chat=True, chat_date=day)
        read, supervision = answers.read(ReadOptions()), answers.supervision(tmp_path / folder, "<|end_of_text|>", None)
        options = TokenizeOptions(read, "<|end_of_text|>", supervision=supervision)
        effort = Effort(1, "tokenizers", silent, pytest.fail)
        tokenize([str(tmp_path / "talks.jsonl")], tmp_path / folder, tmp_path / name, options, effort)

    def told(init_from: str, *names: str) -> str:
        config = RunConfig.model_validate(
            {
                "run": {"dir": str(tmp_path / "run"), "init_from": str(tmp_path / init_from)},
                "model": read_config(tmp_path / "hf")[0].model_dump(mode="json"),
                "data": {"train": [{"path": str(tmp_path / name)} for name in names], "seq_len": 16},
                "train": {"steps": 1, "global_batch_size": 1},
                "optimizer": {"lr": 0.1},
            }
        )
        return "\n".join([*preview.check_origin(config), *preview.check_data("x", config)])

    for begin in ("hf", "checkpoint"):
        assert "another chat template" not in told(begin, "same")
        assert f"{tmp_path / 'new'} was written by another chat template than that of {tmp_path / begin}" in told(
            begin, "new"
        )
    assert (
        f"{tmp_path / 'old'} was written by another chat template than {tmp_path / 'new'}, or on another day"
        in told("hf", "new", "old")
    )


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

"""A model that has learned a conversation by heart ends its answers by itself, as the data taught it."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from transformers import PreTrainedTokenizerFast

from data_tools import cli
from megatrain.data import open_dataset
from megatrain.inference.writer import TextSettings, open_writer
from tests.in_process import caller
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks
from tests.tokenizer_samples import qwen3

TEMPLATE = """<|im_start|>system
{{ strftime_now('%d %B %Y') }}<|im_end|>
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TALK = [
    {"role": "user", "content": "to be?"},
    {"role": "assistant", "content": "<think>or not</think>to be."},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "that is the question"},
]


@pytest.mark.parametrize(
    "tokens",
    [{"eos_token": "<|endoftext|>"}, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}],
    ids=["the closer is not the end", "padding is the closer"],
)
@pytest.mark.slow
def test_an_overfitted_model_ends_its_turns(
    tokens, tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path, monkeypatch, capfd
):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=qwen3(), **tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "talks.jsonl").write_bytes(orjson.dumps({"messages": TALK}) + b"\n")
    words = ["tokenize", "talks.jsonl", "--chat", "--tokenizer", "tokenizer", "--eod-token", "<|endoftext|>"]
    words += ["--chat-date", "2031-05-06"]
    monkeypatch.chdir(tmp_path)
    ended = caller("megatrain-data", cli.main, monkeypatch, capfd)(*words, "--out", "talks")
    assert ended.code == 0, ended.err
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        model={"hidden_size": 64, "max_position_embeddings": 128},
        data={
            "train": [{"path": str(tmp_path / "talks")}],
            "validation": [],
            "seq_len": 128,
            "packing": "best_fit",
            "document_mask": True,
        },
        train={"steps": 60, "global_batch_size": 1, "micro_batch_size": 1},
        optimizer={"lr": 1.0e-2},
        checkpoint={"every_steps": 60},
    )
    one_rank.finish(write_config(tmp_path / "run.yaml", config))
    writer, _ = open_writer(tmp_path / "run")
    document = open_dataset(tmp_path / "talks").document(0).tolist()
    asked = writer.chat_ids(TALK[:1])
    assert document[: len(asked)] == asked  # on the day of the data
    for answered in (1, 3):  # the second question is asked behind an answer that holds a token of the vocabulary
        (written,) = writer.write([writer.chat_ids(TALK[:answered])], TextSettings(60))
        assert (written.text, written.reason) == (TALK[answered]["content"], "stop")

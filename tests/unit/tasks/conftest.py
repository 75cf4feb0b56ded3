"""A small chat model with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatrain.train.convert import import_folder
from tests.tokenizer_samples import llama3

TEMPLATE = """{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>
{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a beginning before a text by itself, and whose template writes one too.

    A Hugging Face folder; beside it, in `checkpoint`, what an import makes of it.
    """
    hf = tmp_path_factory.mktemp("chat") / "hf"
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama3(), **names)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(hf)
    tokenizer.save_pretrained(hf)
    import_folder(hf, hf.parent / "checkpoint")
    return hf

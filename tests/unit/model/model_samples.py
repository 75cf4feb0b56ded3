"""Small models beside their transformers twins, with the same random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from megatrain.batch import Batch
from megatrain.config.schema import ModelConfig
from megatrain.model.decoder import Decoder

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 131,
}


def twin(config: ModelConfig) -> PreTrainedModel:
    """The transformers model of the same shape, with fresh random weights (large enough to matter), in fp32."""
    torch.manual_seed(1)
    known = config.description.hugging_face
    keys = {theirs: getattr(config, ours) for ours, theirs in known.names.items()}
    keys |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings, **known.constants}
    keys |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.05}
    if known.names.get("intermediate_size", "intermediate_size") == "intermediate_size":
        keys["intermediate_size"] = config.ffn_size
    if config.description.block.attention.rotates:
        rope = {"rope_type": "default"} if config.rope_scaling is None else config.rope_scaling.model_dump()
        keys["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
        keys |= {"head_dim": config.head_size}
        keys["num_key_value_heads"] = config.kv_heads
    kind = AutoModelForCausalLM if config.description.block.attention.is_causal else AutoModelForMaskedLM
    if known.labels_key:
        keys["num_labels"], kind = config.num_answers, AutoModelForSequenceClassification
    model = kind.from_config(AutoConfig.for_model(config.family, **keys), torch_dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def decoder_like(twin_model: PreTrainedModel, config: ModelConfig) -> Decoder:
    """A Decoder with the twin's weights."""
    model = Decoder(config)
    parameters = config.description.hugging_face.parameters
    theirs = {name: x for name, x in twin_model.state_dict().items() if name not in parameters.values()}
    model.load_state_dict(theirs)
    return model.eval()


def logits(model: Decoder, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Logits of whole sequences."""
    if positions_BT is None:
        positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return model.logits(tokens_BT, model.make_context(positions_BT, None, None, model.dtype))


def random_batch(num_sequences: int, num_tokens: int, vocab_size: int = SIZES["vocab_size"]) -> Batch:
    """A batch of whole sequences, the same at every call: the successor of each token is asked, at that token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (num_sequences, num_tokens + 1), generator=generator)
    positions_BT = torch.arange(num_tokens).expand(num_sequences, -1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, positions_BT, None, torch.arange(num_sequences) + 100)
    return batch._replace(target_places_BM=positions_BT)

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatrain.batch import Batch
from megatrain.checkpoint.transformers_config import to_transformers
from megatrain.config import load
from megatrain.config.schema import LoraConfig, ModelConfig, ObjectiveConfig
from megatrain.model.decoder import Decoder
from megatrain.model.encoder_decoder import EncoderDecoder
from megatrain.model.linear import add_adapters
from megatrain.plan.flops import flops_per_token, matrix_parameters, num_parameters

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
START = {"pad_token_id": 0, "decoder_start_token_id": 0}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "vocab_size": 101,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # a tied one is listed once


@pytest.mark.parametrize(
    "keys",
    [
        LLAMA_8B,
        {**SMALL, "tie_word_embeddings": True},
        {**SMALL, "tie_word_embeddings": False, "num_key_value_heads": 2},
        {**SMALL, "tie_word_embeddings": True, "head_dim": 24},
    ],
    ids=["8b", "tied", "grouped", "wide heads"],
)
def test_llama_has_as_many_parameters_as_in_transformers(keys):
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**keys))
    assert num_parameters(ModelConfig(family="llama", **keys)) == count(reference)


def test_parameter_counts_match_transformers():
    keys = {**SMALL, "head_dim": 24, "num_key_value_heads": 2, "tie_word_embeddings": False}
    with torch.device("meta"):
        mistral = MistralForCausalLM(MistralConfig(**keys))
        qwen3 = Qwen3ForCausalLM(Qwen3Config(**keys))
    assert num_parameters(ModelConfig(family="mistral", **keys)) == count(mistral)
    assert num_parameters(ModelConfig(family="qwen3", **keys)) == count(qwen3)


def test_the_0_6b_qwen3_has_the_published_size():
    """Qwen3-0.6B: "0.6B, non-embedding 0.44B" (its model card); heads of 128 where hidden_size / heads is 64."""
    keys = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    config = ModelConfig(family="qwen3", **keys, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    assert num_parameters(config) == 596_049_920
    per_layer = 2 * (16 + 8) * 128 * 1024 + 3 * 1024 * 3072
    assert flops_per_token(config, 4096) == 6 * (28 * per_layer + 1024 * 151936) + 12 * 28 * 16 * 128 * 4096


def test_the_half_billion_qwen2_has_the_published_size():
    keys = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    assert num_parameters(ModelConfig(family="qwen2", **keys, num_key_value_heads=2, vocab_size=151936)) == 494_032_768


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("intermediate", [None, 200])
def test_gpt2_has_as_many_parameters_as_in_transformers(tied, intermediate):
    config = GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_inner=intermediate, n_positions=32, vocab_size=101, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        reference = GPT2LMHeadModel(config)
    keys = {**SMALL, "intermediate_size": intermediate, "tie_word_embeddings": tied}
    assert num_parameters(ModelConfig(family="gpt2", **keys)) == count(reference)


def test_the_124m_gpt2_has_the_published_size():
    keys = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024}
    assert num_parameters(ModelConfig(family="gpt2", vocab_size=50257, **keys)) == 124_439_808


def test_the_base_bert_has_the_published_size():
    """Of transformers' BertForMaskedLM. Of a sample's 512 tokens, 15% of the 510 of text go through the head."""
    keys = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512}
    model = ModelConfig(family="bert", vocab_size=30522, **keys)
    assert num_parameters(model) == 109_514_298
    layers, head = 12 * (4 * 768**2 + 2 * 768 * 3072), 768**2 + 768 * 30522
    predicted = ObjectiveConfig().most_targets(model, 512) / 512
    assert predicted == 76 / 512
    expected = 6 * layers + 6 * head * 76 / 512 + 12 * 12 * 768 * 512
    assert flops_per_token(model, 512, predicted=predicted) == pytest.approx(expected, abs=1)


def test_marian_has_the_parameters_of_transformers():
    """The recipe's, and one of two vocabularies; the bias of its logits is trained here, and positions have none."""
    paper = load("marian_base_1xgpu").model
    two = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30000}
    for model in (paper, paper.model_copy(update=two), paper.model_copy(update={**two, "tie_word_embeddings": False})):
        with torch.device("meta"):
            reference = MarianMTModel(MarianConfig(**to_transformers(model, "float32"), **START))
        trained = sum(x.numel() for name, x in reference.named_parameters() if "embed_positions" not in name)
        assert num_parameters(model) == trained + model.known_vocab_size
    assert num_parameters(paper) == 63_119_496


def test_products_of_a_pair_are_counted():
    """Both passes of an encoder and its decoder, for a source and a target of unequal lengths."""
    keys = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 90, "num_decoder_layers": 2}
    model = ModelConfig(family="marian", **SMALL, **keys)
    stacks, (source_BS, target_BT) = EncoderDecoder(model), (torch.zeros((1, n), dtype=torch.long) for n in (20, 12))
    batch = Batch(target_BT, target_BT, None, torch.arange(12)[None], None, torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counter:
        stacks(batch._replace(source_tokens_BS=source_BS, source_positions_BS=torch.arange(20)[None])).backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if name in ("aten.mm", "aten.addmm"))
    attention = 12 * 64 * (3 * 20 * 20 + 2 * 12 * (12 + 20))
    assert (products + attention) // 20 == flops_per_token(model, 20, target_len=12)


def test_matrix_parameters_count_linear_layers_and_tied_heads():
    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True, num_key_value_heads=2))
    linear = [module for module in reference.modules() if isinstance(module, torch.nn.Linear)]
    expected = sum(module.weight.numel() for module in linear)
    assert matrix_parameters(ModelConfig(family="llama", **SMALL, num_key_value_heads=2)) == expected


def test_flops_of_a_token_follow_the_definition():
    """6 x matrix parameters, output head included, + 12 x layers x heads x head size x seq_len: by hand for an 8B."""
    matrices = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 4096 * 128256
    assert flops_per_token(ModelConfig(family="llama", **LLAMA_8B), 8192) == 6 * matrices + 12 * 32 * 32 * 128 * 8192


def test_a_window_bounds_the_flops_of_attention():
    windowed = ModelConfig(family="mistral", **LLAMA_8B, sliding_window=1000)
    whole = ModelConfig(family="mistral", **LLAMA_8B)
    saved = flops_per_token(whole, 8192) - flops_per_token(windowed, 8192)
    assert saved == 12 * 32 * 32 * 128 * (8192 - 1000)
    assert flops_per_token(windowed, 512) == flops_per_token(whole, 512)


def test_frozen_matrices_cost_no_weight_gradients():
    """The products of both passes, counted. The formula counts one of the first layer's input, which has none."""
    model = ModelConfig(family="llama", **SMALL, num_key_value_heads=2)
    lora = LoraConfig(rank=4, alpha=8.0)
    decoder = Decoder(model)
    add_adapters(decoder, lora)
    tokens_BT = torch.zeros((1, 16), dtype=torch.long)
    positions_BT = torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter:
        decoder(Batch(tokens_BT, tokens_BT, None, positions_BT, None, torch.zeros(1))).backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if name in ("aten.mm", "aten.addmm"))
    attention = decoder.get_submodule(f"{decoder.decoder_names[0]}.self_attn")
    first = [p for name, p in attention.named_parameters() if name[:2] in ("q_", "k_", "v_") and "lora_B" not in name]
    unneeded = 2 * sum(parameter.numel() for parameter in first)
    of_attention = flops_per_token(model, 16) - 6 * matrix_parameters(model)
    assert products == 16 * (flops_per_token(model, 16, lora) - of_attention - unneeded), counts

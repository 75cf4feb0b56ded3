"""LoRA's adapters compute what peft's do on the same model and batch: logits, loss and every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_samples import SIZES, decoder_like, logits, random_batch, twin
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.nn import functional

from megatrain.config.schema import LoraConfig, ModelConfig
from megatrain.distributed.fragment import FlatShard, TensorSlice
from megatrain.model.decoder import Decoder
from megatrain.model.init import InitialWeights, init_model
from megatrain.model.linear import add_adapters
from megatrain.plan.flops import adapter_shapes, num_trained_parameters

LLAMA = {"family": "llama", "num_key_value_heads": 2}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "llama-all": (LLAMA, "all-linear"),
    "llama-some": ({**LLAMA, "tie_word_embeddings": False}, ["q_proj", "v_proj", "mlp.gate_proj"]),
    "gpt2-all": ({"family": "gpt2"}, "all-linear"),
    "gpt2-attention": ({"family": "gpt2"}, ["c_attn"]),
    "gpt2-square": ({"family": "gpt2"}, ["c_proj"]),
    "qwen3-all": ({"family": "qwen3", "head_dim": 24}, "all-linear"),
    "bert": ({"family": "bert"}, ["query", "value", "intermediate.dense", "output.dense"]),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_compute_what_those_of_peft_do(case: str) -> None:
    keys, targets = CASES[case]
    config, lora = ModelConfig(**SIZES, **keys), LoraConfig(rank=6, alpha=21.0, target_modules=targets)
    reference, batch = twin(config), random_batch(2, 150)
    ours = decoder_like(reference, config)
    add_adapters(ours, lora)
    theirs = get_peft_model(reference, PeftConfig(r=6, lora_alpha=21, target_modules=targets)).eval()
    adapters = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {name: p.shape for name, p in trained.items()} == {name: p.shape for name, p in adapters.items()}
    assert {name: tuple(p.shape) for name, p in trained.items()} == adapter_shapes(config, lora)
    with torch.no_grad():
        for name, parameter in trained.items():
            adapters[name].normal_(std=0.1)
            parameter.copy_(adapters[name])
        torch.testing.assert_close(logits(ours, batch.tokens_BT), theirs(batch.tokens_BT).logits, atol=1e-5, rtol=1e-5)
    loss = ours(batch) / batch.targets_BM.numel()
    expected = functional.cross_entropy(theirs(batch.tokens_BT).logits.flatten(0, 1), batch.targets_BM.flatten())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, adapters[name].grad, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if name not in trained)


def test_adapters_begin_as_those_of_peft_do() -> None:
    config, lora = ModelConfig(**SIZES, **LLAMA), LoraConfig(rank=8, alpha=8.0)
    model = Decoder(config)
    add_adapters(model, lora)
    init_model(model, config, seed=3)
    for name, parameter in model.state_dict().items():
        if name.endswith("lora_B.weight"):
            assert not parameter.any()
        elif name.endswith("lora_A.weight"):  # uniform within 1 / sqrt(inputs), as kaiming_uniform_ with a = sqrt(5)
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.9 * bound < float(parameter.abs().max()) <= bound
            assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert abs(float(parameter.mean())) < 0.15 * bound
    (shape,) = {
        shape for name, shape in adapter_shapes(config, lora).items() if name.endswith("0.mlp.down_proj.lora_A.weight")
    }
    name, columns = "model.layers.0.mlp.down_proj.lora_A.weight", TensorSlice((0, 10), (8, 20))
    part = InitialWeights(config, 3).read(FlatShard(name, shape, columns, 0, 160), "weight").view(8, 20)
    assert torch.equal(part, model.get_parameter(name)[:, 10:30])


def test_dropout_depends_on_the_sample_alone() -> None:
    config, lora = ModelConfig(**SIZES, **LLAMA), LoraConfig(rank=4, alpha=64.0, dropout=0.5)
    model = Decoder(config)
    add_adapters(model, lora, seed=5)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch(2, 20)
    ids_B = torch.tensor([3, 9])
    swapped = batch._replace(tokens_BT=batch.tokens_BT.flip(0), targets_BM=batch.targets_BM.flip(0))
    with torch.no_grad():
        dropped = model(batch._replace(sample_ids_B=ids_B))
        torch.testing.assert_close(model(swapped._replace(sample_ids_B=ids_B.flip(0))), dropped)
        assert not torch.isclose(model(batch._replace(sample_ids_B=ids_B + 1)), dropped)
        assert not torch.isclose(model.eval()(batch), dropped)


def test_the_trained_parameters_are_counted() -> None:
    config = ModelConfig(**SIZES, **LLAMA)
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
    assert num_trained_parameters(config, lora) == 2 * 4 * ((64 + 64) + (config.ffn_size + 64))

"""Layers are compiled into few graphs, without a break, and nothing falls back to eager without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import exc
from torch._dynamo.testing import CompileCounter

from megatrain.batch import Batch
from megatrain.config import RunConfig
from megatrain.config.schema import LoraConfig, ModelConfig
from megatrain.distributed.activity import Activity
from megatrain.errors import ConfigError
from megatrain.model.decoder import Decoder
from megatrain.model.encoder_decoder import EncoderDecoder
from megatrain.model.init import init_model
from megatrain.model.linear import add_adapters
from megatrain.parallel import compile as compiling
from megatrain.parallel.compile import compile_layers, compiler_errors_told, is_compiled

NUM_LAYERS = 4
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"family": "gpt2"},
    "qwen3": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 24},
    "mistral": {"family": "mistral", "sliding_window": 10},
    "flash": {"attention": "flash"},
    "flash in a window": {"family": "mistral", "sliding_window": 10, "attention": "flash"},
}
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1, target_modules=("all-linear",))
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts graphs, which are traced but not made into code."""
    counter = CompileCounter()
    monkeypatch.setattr(compiling, "BACKEND", counter)
    yield counter
    torch.compiler.reset()


def make_model(**keys: Any) -> Decoder | EncoderDecoder:
    sizes = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "vocab_size": 61}
    config = ModelConfig(**{**sizes, "max_position_embeddings": 64, **keys})
    model = EncoderDecoder(config) if config.description.encoder is not None else Decoder(config)
    init_model(model, config, seed=1)
    model.use_attention(config.attention)
    return model


def make_batch(num_sequences: int, with_documents: bool = False) -> Batch:
    tokens_BT = torch.randint(61, (num_sequences, 40), generator=torch.Generator().manual_seed(num_sequences))
    positions_BT = torch.arange(40).expand(num_sequences, -1)
    documents_BT = (positions_BT // 13).int() if with_documents else None
    return Batch(tokens_BT, tokens_BT, None, positions_BT, documents_BT, torch.arange(num_sequences))


def compile_model(model: Any) -> Any:
    compile_layers([model.get_submodule(name) for name in model.decoder_names])
    return model


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_layers_of_a_kind_are_one_graph(keys: dict[str, Any], graphs: Any) -> None:
    batch = make_batch(2, with_documents=True)
    eager = make_model(**keys)(batch)
    compiled = compile_model(make_model(**keys))(batch)
    assert graphs.frame_count == 1
    torch.testing.assert_close(compiled, eager)


IMAGES = {"family": "vit", "image_size": 12, "patch_size": 4, "vocab_size": 3, "tie_word_embeddings": False}


@pytest.mark.parametrize(("keys", "num_kinds"), [({"family": "bert"}, 1), (IMAGES, 1), ({"family": "t5"}, 2)])
def test_an_encoders_layers_have_no_break(keys: dict[str, Any], num_kinds: int, graphs: Any) -> None:
    """A t5's are of two kinds."""
    batch = make_batch(2, with_documents=True)
    if keys["family"] == "bert":
        batch = batch._replace(target_places_BM=batch.positions_BT)
    elif keys["family"] == "vit":
        places_BT = torch.arange(10).expand(2, -1)
        first_B1 = torch.zeros((2, 1), dtype=torch.int64)
        pixels_BCHW = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        batch = Batch(places_BT, first_B1, None, places_BT, None, torch.arange(2), None, first_B1)
        batch = batch._replace(pixels_BCHW=pixels_BCHW)
    else:
        sources = batch.tokens_BT, batch.positions_BT, batch.document_ids_BT
        names = ("source_tokens_BS", "source_positions_BS", "source_document_ids_BS")
        batch = batch._replace(**dict(zip(names, sources, strict=True)))
    eager = make_model(**keys)(batch)
    compiled = compile_model(make_model(**keys))(batch)
    assert graphs.frame_count == num_kinds
    torch.testing.assert_close(compiled, eager)


def test_adapted_layers_are_two_graphs(graphs: Any) -> None:
    batch, model = make_batch(2), make_model()
    add_adapters(model, LORA)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    eager = model(batch)
    torch.testing.assert_close(compile_model(model)(batch), eager)
    assert graphs.frame_count == 2


def test_dropout_takes_a_second_graph(graphs: Any) -> None:
    """Its number of each layer is a constant of the first, and a variable of the second."""
    batch = make_batch(2)
    torch.testing.assert_close(compile_model(make_model(**DROPOUT))(batch), make_model(**DROPOUT)(batch))
    assert graphs.frame_count == 2


@pytest.mark.slow
def test_varying_batches_take_few_graphs(graphs: Any) -> None:
    model = compile_model(make_model(**DROPOUT))

    def train_and_evaluate() -> None:
        for num_sequences in (4, 4, 3, 2, 1, 5):
            batch = make_batch(num_sequences)
            model.train()(batch).backward()
            with torch.no_grad():
                model.eval()(batch)

    train_and_evaluate()
    found = graphs.frame_count
    assert found <= 8
    train_and_evaluate()
    assert graphs.frame_count == found


def test_too_many_graphs_are_an_error(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_GRAPHS", 1)
    model = compile_model(make_model())
    model(make_batch(2))
    with pytest.raises(exc.FailOnRecompileLimitHit):
        model(make_batch(1))


def test_a_compiler_that_fails_is_told() -> None:
    with (
        pytest.raises(ConfigError, match=r"torch.compile failed: no C\+\+ compiler. Train with train.compile=off"),
        compiler_errors_told(),
    ):
        raise exc.TorchDynamoException("no C++ compiler\nand much more")


def make_config(compile_: str, **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61},
            "data": {"train": [{"path": "unused"}], "seq_len": 32},
            "train": {"steps": 2, "global_batch_size": 4, "compile": compile_},
            "optimizer": {"lr": 1.0e-3},
            "parallel": parallel,
        }
    )


def test_auto_compiles_on_gpus() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert is_compiled(make_config("auto"), gpu)
    assert is_compiled(make_config("auto", engine="fsdp2", zero_stage=3), gpu)
    assert not is_compiled(make_config("auto", zero_stage=3), gpu)
    assert not is_compiled(make_config("auto"), cpu)
    assert is_compiled(make_config("on"), cpu)
    assert not is_compiled(make_config("off"), gpu)


def test_compiling_is_given_time() -> None:
    activity = Activity()
    assert activity.patience_seconds == 0.0
    activity.enter(0, "compile")
    assert activity.patience_seconds >= 600.0

"""What only a device can show of kernels: `pytest -m gpu`. At shapes of real models, where kernels have been wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.batch import Batch, document_starts
from megatrain.config import ModelConfig
from megatrain.model.attention import attend_alone
from megatrain.model.decoder import Decoder
from megatrain.model.init import init_model
from megatrain.model.kernels import Use, forget_flash3, why_missing
from megatrain.parallel.compile import compile_layers
from tests.gpu.test_training import make_config, train
from tests.runs import TinyData

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB_SIZE, SEQ_LEN = 1024, 4096
NOT_THERE = ("needs", "cannot activate", "without masks")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5632},
    "gpt2": {"family": "gpt2", "hidden_size": 1600, "num_attention_heads": 25},
    "qwen3": {"family": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8},
}


@pytest.fixture(autouse=True)
def own_graphs_and_kernels() -> Iterator[None]:
    yield
    torch.compiler.reset()
    forget_flash3()


def gradients(
    sizes: dict[str, Any],
    num_sequences: int,
    kernel: str = "auto",
    *,
    has_documents: bool = False,
    compiled: bool = False,
) -> dict[str, torch.Tensor]:
    """Of each parameter, in bf16."""
    keys = {"num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "max_position_embeddings": SEQ_LEN, **sizes}
    config = ModelConfig(**keys)
    model = Decoder(config)
    init_model(model, config, seed=1)
    model.use_attention(kernel)
    model.to(DEVICE, torch.bfloat16)
    if compiled:
        compile_layers([model.get_submodule(name) for name in model.decoder_names])
    generator = torch.Generator().manual_seed(num_sequences)
    tokens_BT = torch.randint(VOCAB_SIZE, (num_sequences, SEQ_LEN), generator=generator)
    positions_BT = torch.arange(SEQ_LEN).expand(num_sequences, -1)
    documents_BT = (positions_BT // 1500).int() if has_documents else None
    borders = document_starts(documents_BT) if documents_BT is not None else None
    numbers_B = torch.arange(num_sequences)
    batch = Batch(tokens_BT, tokens_BT, None, positions_BT, documents_BT, numbers_B, borders).to(DEVICE)
    model(batch).sum().backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: float((found[name] - x).norm() / x.norm()) for name, x in wanted.items()}
    assert {name: error for name, error in errors.items() if not error < 0.03} == {}


@pytest.mark.parametrize("num_sequences", [1, 4, 5])
@pytest.mark.parametrize("model", MODELS)
def test_compiled_gradients_are_the_eager_ones(model: str, num_sequences: int) -> None:
    """Also of norms, which some versions of torch left unwritten at some 16,000 tokens."""
    eager = gradients(MODELS[model], num_sequences)
    assert_alike(gradients(MODELS[model], num_sequences, compiled=True), eager)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("has_borders", [True, False])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (4, 128), (8, 80)])
@pytest.mark.parametrize("num_tokens", [4096, 1000, 333])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["flash3", "cudnn", "flash"])
def test_a_kernel_computes_what_math_does(kernel, dtype, num_tokens, heads, head_dim, has_borders, is_causal) -> None:
    """Forward and backward."""
    use = Use(DEVICE, dtype, num_tokens, heads, head_dim, has_borders, is_causal)
    reason = why_missing(kernel, use, attend_alone)
    if reason is not None and any(words in reason for words in NOT_THERE):
        pytest.skip(reason)
    assert reason is None


def test_no_gradient_comes_from_unwritten_memory() -> None:
    """What lies behind the last border of a document, and whatever else a kernel leaves out, would be NaN here."""
    wanted = gradients(MODELS["llama"], 4, "math", has_documents=True)
    poison = [torch.full((size << 20,), torch.nan, device=DEVICE) for size in (1, 2, 4, 8, 16, 32, 64, 128)]
    del poison  # back to the allocator, which gives it out as it is
    assert_alike(gradients(MODELS["llama"], 4, "flash", has_documents=True), wanted)


def test_batches_arrive_whole_from_reused_pinned_memory() -> None:
    """The host is far ahead of a busy device, and drops each batch as soon as its copy is asked for."""
    busy = torch.randn(8192, 8192, device=DEVICE)
    places, moved = torch.arange(64).expand(8, -1), []
    for step in range(100):
        busy = busy @ busy.clamp(-1e-3, 1e-3)
        tokens_BT = torch.full((8, 64), step)
        batch = Batch(tokens_BT, tokens_BT, None, places, None, torch.arange(8)).packed(pin=DEVICE.type == "cuda")
        moved.append(batch.to(DEVICE))
        del batch
    for step, batch in enumerate(moved):
        assert bool((batch.tokens_BT == step).all() & (batch.targets_BM == step).all())
        assert torch.equal(batch.positions_BT.cpu(), places)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_messages_beside_the_passes_change_no_bit(zero_stage: int, tiny_data: TinyData, tmp_path: Path) -> None:
    """DeepSpeed's `overlap_comm`, on and off, over 20 steps."""
    runs = []
    for overlaps in (False, True):
        zero = {"zero_optimization": {"overlap_comm": overlaps, "reduce_bucket_size": 50_000}}
        bits = {"train": {"precision": "bf16", "deterministic": True, "steps": 20, "micro_batch_size": 2}}
        layout = {"parallel": {"zero_stage": zero_stage}, "deepspeed": zero}
        runs.append(train(make_config(tiny_data, tmp_path / str(overlaps), bits, layout)))
    assert (runs[0].losses, runs[0].norms) == (runs[1].losses, runs[1].norms)

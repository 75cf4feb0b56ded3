"""Compilation by torch.compile, layer by layer: layers of a kind share one graph, which does not grow with the depth.

Of a decoder layer its ``forward`` is compiled, so that hooks on the layer itself stay outside: FSDP2's, which gather
its weights, and the one that cuts the sequence before the first layer. What communicates within it under tensor
parallelism is traced, with its collectives. Full recomputation goes around what is compiled here.

Nothing falls back to eager without a word: a graph break is an error, and so are too many graphs.

What is used of torch's compiler beside what it documents:

| name | reason |
|---|---|
| ``_dynamo.config.fail_on_recompile_limit_hit`` | else torch runs such a layer eagerly, with a warning |
| ``_dynamo.config.allow_unspec_int_on_nn_module`` | each layer drops by a number of its own: no graph for each |
| ``_dynamo.config.recompile_limit`` | of one function: sizes of a batch, with and without gradients, chunks |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from megatrain.config import RunConfig
from megatrain.errors import ConfigError
from megatrain.parallel.pipeline import Field

BACKEND = "inductor"
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
MAX_GRAPHS = 32
"""Of one kind of layer. A batch's sizes give three at most (the first, one sequence, any other), each with and without
gradients, with and without documents."""


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer's forward pass, at its first call, and its backward pass at the first of those."""
    import torch._dynamo.config as settings
    import torch._inductor.config as inductor

    settings.fail_on_recompile_limit_hit = True
    settings.allow_unspec_int_on_nn_module = True
    settings.recompile_limit = MAX_GRAPHS
    if torch.are_deterministic_algorithms_enabled() and not hasattr(inductor, "deterministic"):
        raise ConfigError(
            f"train.deterministic is true, but the compiler of torch {torch.__version__} times kernels and takes the "
            "quickest: set train.compile to off, or install a later torch."
        )
    for layer in layers:
        # In its place, so that the layer's name and its hooks stay what they were.
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend=BACKEND)


def is_compiled(config: RunConfig, device: torch.device) -> bool:
    """Whether ``train.compile`` asks for it. On a CPU layers take longer to compile than most runs can win back."""
    if config.train.compile == "auto":
        is_fetched_within = config.parallel.engine == "deepspeed" and config.parallel.zero_stage == 3
        return device.type == "cuda" and not is_fetched_within
    return config.train.compile == "on"


def run_once(layer: nn.Module, hidden: Field, context: Any) -> None:
    """A forward and a backward pass of a layer that leave nothing behind: no gradient of a weight, so no hook of it.

    ``hidden``: shape and type of what it takes and gives.
    """
    x_BTC = torch.zeros(hidden.shape, dtype=hidden.dtype, device=context.positions_BT.device, requires_grad=True)
    torch.autograd.grad(layer.forward(x_BTC, context).sum(), x_BTC)


@contextlib.contextmanager
def compiler_errors_told() -> Iterator[None]:
    """Raise ConfigError for what torch's compiler raises: no C++ compiler, an operation that it does not take."""
    from torch._dynamo.exc import TorchDynamoException  # torch's compiler takes a second to load

    try:
        yield
    except TorchDynamoException as error:
        what = str(error).strip().partition("\n")[0]
        folder = f" It compiles into {os.environ[CACHE_DIR]}." if "Errno" in what and CACHE_DIR in os.environ else ""
        raise ConfigError(f"torch.compile failed: {what}.{folder} Train with train.compile=off.") from error


def uncompiled() -> AbstractContextManager[None]:
    """In this context layers run eagerly: for answers, whose lengths vary, and which keep what they have seen."""
    eagerly: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return eagerly


def forget_compiled() -> None:
    """Let the layers of another model in this process have graphs of their own."""
    torch.compiler.reset()

"""The ranges that name the parts of a step in a profiler's trace: torch.profiler's, and with it NVTX's.

Passes, updates and the messages of a pipeline are always named: ``torch.profiler.record_function`` costs some
microseconds a micro-batch. Modules are named on request alone, since there are a dozen in each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.profiler import record_function

STEP = "step"
DATA = "data"
FORWARD = "forward"
BACKWARD = "backward"
MESSAGES = "messages"
OPTIMIZER = "optimizer"
EXCHANGE = "exchange"


def name_modules(chunks: Sequence[Any], *, is_compiled: bool) -> list[str]:
    """Let the forward pass of each module of these DecoderStages be a range of its name; gives the names. A compiled
    layer is one range: the compiler fuses what its modules compute."""
    names = []
    for chunk in chunks:
        within_layers = tuple(f"{name}." for name in chunk.decoder_names)
        for name, module in chunk.named_modules():
            is_one = is_compiled and name.startswith(within_layers)
            if name and not is_one and type(module) is not nn.Module:  # one that only holds others
                module.forward = functools.partial(_in_range, name, module.forward)  # its hooks stay outside
                names.append(name)
    return names


def _in_range(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with record_function(name):
        return forward(*args, **kwargs)

"""Activation recomputation: what is not kept in the forward pass is computed again in the backward pass.

No random state is saved or restored: dropout is a function of the sample, so the second pass drops what the first did.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_layers(layers: Sequence[nn.Module], every: int) -> None:
    """Keep only the input of every ``every``-th decoder layer."""
    for layer in layers[::every]:
        _recompute(layer)


def recompute_cores(layers: Sequence[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
    """Keep only the inputs of the submodules of ``kinds``: attention core and activation, which cost memory, not time
    (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models")."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, kinds):
                _recompute(module)


def _recompute(module: nn.Module) -> None:
    forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    module.forward = forward  # its name and its hooks stay what they were

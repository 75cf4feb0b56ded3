"""What a decoder layer needs to know of its tokens, besides activations; made once a forward, shared by all layers.

B: sequences, T: tokens, S: tokens seen so far, G: key-value heads, D: head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megatrain.model.rope import Rotary, RotaryEmbedding

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig

TORCH_VERSION = TorchVersion(torch.__version__)


class KeyValueCache:
    """Keys and values of the tokens seen so far, for every layer: what generation need not compute again."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens whose keys and values every layer has stored
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def update(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values behind the old ones; return all of them, [B, S, G, D] each."""
        if self.length and k_BTGD.shape[1] > 1:
            raise ValueError("after the prompt a cache takes one token at a time")
        stored = self._layers[layer]
        if stored is None:
            shape = (k_BTGD.shape[0], self.capacity, *k_BTGD.shape[2:])
            stored = self._layers[layer] = (k_BTGD.new_empty(shape), v_BTGD.new_empty(shape))
        end = self.length + k_BTGD.shape[1]
        for cache, new in zip(stored, (k_BTGD, v_BTGD), strict=True):
            cache[:, self.length : end] = new
        return stored[0][:, :end], stored[1][:, :end]

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` as seen, once every layer has stored them."""
        self.length += num_tokens


class Context(NamedTuple):
    """Beside ``positions_BT``, ``document_ids_BT`` and ``sample_ids_B`` (see Batch), what follows from them.

    ``rotary``: cosines and sines of the positions, where the family rotates.
    ``document_starts``: int32, where each document starts in the B*T tokens laid end to end, and B*T; where a window
    is shorter than the sequences, and there are no documents, where each sequence does. None where the device has no
    attention over sequences of unequal length.
    ``cache``: keys and values of earlier tokens; None while training.
    """

    positions_BT: Tensor
    document_ids_BT: Tensor | None = None
    sample_ids_B: Tensor | None = None
    rotary: Rotary | None = None
    document_starts: Tensor | None = None
    cache: KeyValueCache | None = None


class ContextBuilder:
    """Makes the Context of a forward from the tensors that a pipeline hands on between its stages."""

    def __init__(self, config: ModelConfig) -> None:
        self._rotary_embedding = RotaryEmbedding(config) if config.description.block.attention.rotates else None
        self._window = config.attention_window

    def __call__(
        self,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        sample_ids_B: Tensor | None,
        dtype: torch.dtype,
        cache: KeyValueCache | None = None,
    ) -> Context:
        """The context of a forward in ``dtype``."""
        rotary = self._rotary_embedding(positions_BT, dtype) if self._rotary_embedding else None
        starts = None
        if has_variable_length_attention(positions_BT.device, dtype):
            num_tokens = positions_BT.shape[1]
            if document_ids_BT is not None:
                starts = document_starts(document_ids_BT)
            elif self._window is not None and self._window < num_tokens:
                starts = torch.arange(
                    0, positions_BT.numel() + 1, num_tokens, dtype=torch.int32, device=positions_BT.device
                )
        return Context(positions_BT, document_ids_BT, sample_ids_B, rotary, starts, cache)


def has_variable_length_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention over documents needs no dense mask: flash attention, so CUDA and half precision; torch 2.11."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and TORCH_VERSION >= "2.11"


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Index of the first token of each document among the B*T tokens, and B*T at the end (int32)."""
    is_start_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts = is_start_BT.flatten().nonzero().flatten().to(torch.int32)
    return torch.nn.functional.pad(starts, (0, 1), value=document_ids_BT.numel())

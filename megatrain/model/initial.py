"""The initial weights as a source of pieces: like a checkpoint that is computed instead of read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatrain.distributed.fragment import Piece
from megatrain.model.init import CHUNK_ELEMENTS, _values

if TYPE_CHECKING:
    from megatrain.config.schema import ModelConfig


class InitialWeights:
    """Any piece of any parameter, made from the seed by itself."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def read(self, wanted: Piece, kind: str) -> Tensor:
        """The piece's initial weights: 1-D, fp32, on the CPU."""
        if kind != "weight":
            raise ValueError(f"there is no initial {kind}")
        out = torch.empty(wanted.length)
        for first in range(0, wanted.length, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, wanted.length)
            index = _global_index(torch.arange(wanted.start + first, wanted.start + last), wanted)
            out[first:last] = _values(index, wanted.name, len(wanted.global_shape), self._config, self._seed)
        return out


def _global_index(local: Tensor, piece: Piece) -> Tensor:
    """Flat indices in a piece's box to flat indices in the global tensor."""
    if piece.box.extent == piece.global_shape:
        return local
    index, stride = torch.zeros_like(local), 1
    for offset, extent, size in reversed(
        list(zip(piece.box.offset, piece.box.extent, piece.global_shape, strict=True))
    ):
        index += (local % extent + offset) * stride
        local = local // extent
        stride *= size
    return index

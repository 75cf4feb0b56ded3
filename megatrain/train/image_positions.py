"""The positions of a classifier of images for another size of images than that of the checkpoint in ``run.init_from``.

A: places before, B: after, C: channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from megatrain.distributed.fragment import FlatShard
from megatrain.parallel.engine import StateReader


def resized(positions_1AC: Tensor, num_places: int) -> Tensor:
    """[1, B, C] of B = ``num_places``: the class token's as it is, and those of the patches, which lie in a square,
    interpolated, bicubic, as transformers' ``interpolate_pos_encoding`` does."""
    of_class, of_patches = positions_1AC[:, :1], positions_1AC[:, 1:]
    before, after = (math.isqrt(count - 1) for count in (positions_1AC.shape[1], num_places))
    grid_1CHW = of_patches.transpose(1, 2).reshape(1, -1, before, before)
    grid_1CHW = functional.interpolate(grid_1CHW, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([of_class, grid_1CHW.flatten(2).transpose(1, 2)], dim=1)


class ReplacedWeight:
    """A source of shards in which the tensor ``name`` is another one, fp32 on the CPU."""

    is_computed = False

    def __init__(self, source: StateReader, name: str, weight: Tensor) -> None:
        self._source, self._name, self._weight = source, name, weight

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """See `StateReader`."""
        if wanted.name != self._name:
            self._source.read_into(target, wanted, kind)
            return
        part = wanted.tensor_slice
        places = tuple(slice(first, first + count) for first, count in zip(part.offset, part.extent, strict=True))
        target.copy_(self._weight[places].flatten()[wanted.start : wanted.stop])

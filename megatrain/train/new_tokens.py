"""What a model has beyond the checkpoint in ``run.init_from``: rows for further tokens, a head of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.config import ModelConfig
from megatrain.distributed import rng
from megatrain.distributed.fragment import FlatShard, ShardSpec, TensorSlice
from megatrain.model.init import InitialWeights, normal
from megatrain.parallel.engine import StateReader
from megatrain.plan.flops import parameter_shapes

COVARIANCE_SCALE = 1e-9
"""As in transformers' `resize_token_embeddings`: new rows are the mean of the old ones, all but equal."""
_ROWS_AT_ONCE = 8192


def new_rows(reader: CheckpointReader, before: ModelConfig, after: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The rows that the tables of tokens (embedding, and head where it is not tied) have more in ``after``: fp32.
    What ``before`` does not have is passed over: a new head.

    Each is drawn from the normal distribution of the mean of the old rows and 1e-9 of their covariance, as transformers
    does. With x the n old rows less their mean and g standard normal, g x / sqrt(n) has that covariance: no matrix of
    it is made. g is a function of the seed, the table's name and the row. Of a head's bias [rows, 1], the mean.
    """
    former, shapes = parameter_shapes(before), parameter_shapes(after)
    found = {}
    for name, shape in shapes.items():
        if shape == former.get(name, shape):
            continue
        if len(shape) == 1:
            old = reader.read_parameter(ShardSpec.whole(name, former[name]), "weight")
            found[name] = old.double().mean().float().expand(shape[0] - former[name][0], 1)
            continue
        (num_old, width), num_new = former[name], shape[0] - former[name][0]
        key = rng.stream_key(seed, f"{name}.new_rows")
        sums, noise = torch.zeros(width, dtype=torch.float64), torch.zeros(num_new, width, dtype=torch.float64)
        drawn = torch.zeros(num_new, 1, dtype=torch.float64)
        for first in range(0, num_old, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, num_old - first)
            part = TensorSlice((first, 0), (count, width))
            old = reader.read(FlatShard(name, (num_old, width), part, 0, part.numel), "weight").view(-1, width)
            index = torch.arange(num_new).unsqueeze(1) * num_old + torch.arange(first, first + count)
            g = normal(key, index.flatten()).view(num_new, count).double()
            sums += old.double().sum(0)
            noise += g @ old.double()
            drawn += g.sum(1, keepdim=True)
        mean = sums / num_old
        found[name] = (mean + math.sqrt(COVARIANCE_SCALE / num_old) * (noise - drawn * mean)).float()
    return found


class ResizedWeights:
    """A checkpoint's weights with further rows: a source of shards of the larger model."""

    is_computed = False

    def __init__(self, reader: CheckpointReader, rows: Mapping[str, Tensor]) -> None:
        self._reader, self._rows = reader, rows

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """The same into ``target``: 1-D, fp32, on the CPU, contiguous."""
        rows = self._rows.get(wanted.name)
        if rows is None:
            self._reader.read_into(target, wanted, kind)
            return
        offset, extent, num_dims = wanted.tensor_slice.offset, wanted.tensor_slice.extent, len(wanted.global_shape)
        (first, left), (num_rows, width) = (*offset, 0)[:2], (*extent, 1)[:2]
        num_old = wanted.global_shape[0] - len(rows)
        num_read = min(max(num_old - first, 0), num_rows)  # of the slice's rows those that are the checkpoint's
        count = min(max(num_read * width - wanted.start, 0), wanted.length)
        if count:
            part = TensorSlice((first, left)[:num_dims], (num_read, width)[:num_dims])
            old = FlatShard(wanted.name, (num_old, *wanted.global_shape[1:]), part, wanted.start, count)
            self._reader.read_into(target[:count], old, kind)
        added = rows[first + num_read - num_old : first + num_rows - num_old, left : left + width].flatten()
        start = max(wanted.start - num_read * width, 0)
        target[count:] = added[start : start + wanted.length - count]


class NewHead:
    """A checkpoint's weights, but for those of the head, which ``initial`` has."""

    is_computed = False

    def __init__(self, reader: StateReader, initial: InitialWeights, head: Sequence[str]) -> None:
        self._reader, self._initial, self._head = reader, initial, frozenset(head)

    def read_into(self, target: Tensor, wanted: FlatShard, kind: str) -> None:
        """See ResizedWeights."""
        (self._initial if wanted.name in self._head else self._reader).read_into(target, wanted, kind)

"""A row of a batch: documents laid end to end, and filling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatrain.data.sample import Ints


@dataclass(frozen=True)
class Row:
    """Documents laid end to end, and filling: a document of its own."""

    tokens: Ints
    positions: Ints
    document_ids: NDArray[np.int32]
    is_filling: NDArray[np.bool_]


def filled(documents: Sequence[Ints], length: int, filling: int) -> Row:
    """A row of ``length`` tokens; its free space has the token ``filling``."""
    lengths = [len(document) for document in documents]
    rest = length - sum(lengths)
    tokens = np.concatenate([*documents, np.full(rest, filling)])
    ids = np.repeat(np.arange(len(lengths) + 1, dtype=np.int32), [*lengths, rest])
    positions = np.concatenate([np.arange(count) for count in (*lengths, rest)])
    return Row(tokens, positions, ids, ids == len(lengths))

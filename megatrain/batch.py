"""What passes from the data through the model: named records, so that later fields find their place.

B: sequences in a micro-batch, T: tokens in a sequence, N: tokens whose successor is asked, V: vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of one data rank.

    ``tokens_BT``, ``targets_BT``: int64; targets are the tokens shifted by one.
    ``loss_mask_BT``: bool, False where a target is not scored; None: every target counts.
    ``positions_BT``: int64, the position of each token (within its document where documents are masked).
    ``document_ids_BT``: int32, equal for two tokens that may see one another; None: all of a sequence may.
    ``sample_ids_B``: int64, the number of each sample in the run's global order: what seeds its dropout.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor | None
    positions_BT: Tensor
    document_ids_BT: Tensor | None
    sample_ids_B: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor to ``device`` (without waiting for it, where the memory is pinned)."""
        moved: dict[str, Any] = {
            name: None if x is None else x.to(device, non_blocking=True) for name, x in self._asdict().items()
        }
        return Batch(**moved)


class InferenceBatch(NamedTuple):
    """What a model in use is asked: how likely each token is after some of the batch's tokens.

    ``rows_N``, ``columns_N``: which tokens these are. ``targets_N``: the tokens that follow them; None: every token of
    the vocabulary is asked. ``cache``: keys and values of the tokens before (`megatrain.model.context`); None: there
    are none.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor | None = None
    cache: Any = None

    def to(self, device: torch.device) -> InferenceBatch:
        """Copy every tensor to ``device``."""
        tensors = {name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)

"""What passes from the data through the model: named records, so that later fields find their place.

B: sequences in a micro-batch, T: tokens in a sequence, M: targets of a sequence, N: tokens whose successor is asked,
V: vocabulary.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, of each tensor in a piece of memory


class Batch(NamedTuple):
    """One micro-batch of one data rank.

    ``tokens_BT``: int64, what the model reads.
    ``targets_BM``: int64, what it predicts, as the objective says: in next-token prediction each token's successor.
    ``loss_mask_BM``: bool, False where a target is not scored; or fp32, how much of one it counts; None: every target
    counts.
    ``positions_BT``: int64, the position of each token (within its document where documents are masked).
    ``document_ids_BT``: int32, equal for two tokens that may see one another; None: all of a sequence may.
    ``sample_ids_B``: int64, the number of each sample in the run's global order: what seeds its dropout.
    ``document_starts``: int32, where each document begins in the B*T tokens laid end to end, and B*T; None: as above.
    ``target_places_BM``: int64, the token of its sequence that each target is predicted at; None: one at each token.
    ``source_tokens_BS``, ``source_positions_BS``, ``source_document_ids_BS``: what an encoder reads, if there is one; a
    token of the target sees the source that has its document's id.
    ``segments_BT``: int64, which segment of its document a token is in (BERT's token types); None: all in the first.
    ``pixels_BCHW``: fp32, normalised, what the model reads where it is images, whose patches ``tokens_BT`` numbers.
    """

    tokens_BT: Tensor
    targets_BM: Tensor
    loss_mask_BM: Tensor | None
    positions_BT: Tensor
    document_ids_BT: Tensor | None
    sample_ids_B: Tensor
    document_starts: Tensor | None = None
    target_places_BM: Tensor | None = None
    source_tokens_BS: Tensor | None = None
    source_positions_BS: Tensor | None = None
    source_document_ids_BS: Tensor | None = None
    pixels_BCHW: Tensor | None = None
    segments_BT: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the first layer reads."""
        return self.tokens_BT if self.pixels_BCHW is None else self.pixels_BCHW

    def packed(self, *, pin: bool) -> Batch:
        """The same tensors in one piece of memory, so that one copy takes them to a device. ``pin``: that copy can be
        made without waiting for it."""
        tensors = {name: x for name, x in self._asdict().items() if x is not None}
        ends = [*accumulate(-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in tensors.values())]
        memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pin)
        views: dict[str, Any] = {}
        for (name, x), begin in zip(tensors.items(), [0, *ends], strict=False):
            views[name] = memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        return self._replace(**views)

    def to(self, device: torch.device) -> Batch:
        """On ``device``. What is ``packed`` is one copy, which nobody waits for where the memory is pinned."""
        tensors = {name: x for name, x in self._asdict().items() if x is not None}
        storages = {name: x.untyped_storage() for name, x in tensors.items()}
        if len({storage.data_ptr() for storage in storages.values()}) > 1 or self.tokens_BT.device == device:
            return self._replace(**{name: x.to(device, non_blocking=True) for name, x in tensors.items()})
        whole = torch.empty(0, dtype=torch.uint8).set_(storages["tokens_BT"])
        moved = whole.to(device, non_blocking=True)
        views: dict[str, Any] = {}
        for name, x in tensors.items():
            begin = x.storage_offset() * x.itemsize
            views[name] = moved[begin : begin + x.nbytes].view(x.dtype).view(x.shape)
        return self._replace(**views)


class InferenceBatch(NamedTuple):
    """What a model in use is asked: how likely each token is after some of the batch's tokens.

    ``rows_N``, ``columns_N``: which tokens these are. ``targets_N``: the tokens that follow them; None: every token of
    the vocabulary is asked. ``cache``: keys and values of the tokens before (`megatrain.model.context`); None: there
    are none. ``source_tokens_BS``, ``source_lengths_B``: what an encoder reads, padded on the right; not needed where
    the cache has what it made of them.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    targets_N: Tensor | None = None
    cache: Any = None
    source_tokens_BS: Tensor | None = None
    source_lengths_B: Tensor | None = None

    def to(self, device: torch.device) -> InferenceBatch:
        """Copy every tensor to ``device``."""
        tensors = {name: x.to(device) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """Index of the first token of each document among the B*T tokens, and B*T at the end (int32). Made with the
    batch, on the CPU: for their number a device would have to be waited for."""
    is_start_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    starts = is_start_BT.flatten().nonzero().flatten().to(torch.int32)
    return torch.nn.functional.pad(starts, (0, 1), value=document_ids_BT.numel())

"""One sample of a run, as an objective makes it, and where samples come from; NumPy alone, no torch."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.data.images import AnyDataset
from megatrain.data.order import Samples
from megatrain.data.packing import PackingPlan

Ints = NDArray[np.int64]


class Sample(NamedTuple):
    """A row of a `megatrain.batch.Batch`, whose fields have the same names.

    T: tokens that the model reads, M: targets, S: tokens of a source, which an encoder reads. ``loss_mask_M``: None
    where every target counts. ``document_ids_T``: None where each token of the sample may see any other.
    """

    tokens_T: Ints
    targets_M: Ints
    loss_mask_M: NDArray[np.bool_] | NDArray[np.float32] | None
    positions_T: Ints
    document_ids_T: NDArray[np.int32] | None
    target_places_M: Ints | None = None
    source_tokens_S: Ints | None = None
    source_positions_S: Ints | None = None
    source_document_ids_S: NDArray[np.int32] | None = None
    pixels_CHW: NDArray[np.float32] | None = None
    segments_T: Ints | None = None


class Source(Protocol):
    """The samples that an objective makes of a dataset, all of one length and kind."""

    @property
    def dataset(self) -> AnyDataset: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def plan(self) -> PackingPlan | None:
        """What is in each sample, where that was planned for the whole dataset."""
        ...

    @property
    def left_out(self) -> str | None:
        """What of the dataset is in no sample because it fits into none, in words; None: nothing."""
        ...

    @property
    def all_scored(self) -> bool:
        """Whether every target of every sample counts."""
        ...

    def num_targets(self, samples: Samples) -> int:
        """Scored targets of these samples together, all of this source."""
        ...

    def num_bytes(self) -> int:
        """UTF-8 bytes of the text behind the scored targets of all samples."""
        ...

    def sample(self, index: int, epoch: int, number: int) -> Sample:
        """Sample ``index`` of the dataset, as it is seen in ``epoch`` and at place ``number`` of the run: a function of
        these and the seed alone."""
        ...

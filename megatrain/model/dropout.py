"""Dropout whose mask every parallel layout computes alike."""

from __future__ import annotations

from torch import Tensor, nn

from megatrain.distributed import rng


class Dropout(nn.Module):
    """Drops by a hash of (seed, ``site``, sample, index of the element within the sample): see ``distributed.rng``.

    ``offsets``: where the tensor starts in each dimension after the first, (token, channel) of activations, (head,
    query, key) of attention probabilities. Zero but where a parallel layout gives a rank a slice, and sets them.
    """

    def __init__(self, probability: float, seed: int, site: str, num_offsets: int = 2) -> None:
        super().__init__()
        self.probability = probability
        self.site = site
        self.offsets: tuple[int, ...] = (0,) * num_offsets
        self._key = rng.stream_key(seed, f"dropout {site}")

    @property
    def is_active(self) -> bool:
        """Whether anything is dropped: never in evaluation."""
        return self.training and self.probability > 0.0

    def forward(self, x: Tensor, sample_ids_B: Tensor | None) -> Tensor:
        """``x``, or where dropout is active :meth:`drop` of it."""
        return self.drop(x, sample_ids_B) if self.is_active else x

    def drop(self, x: Tensor, sample_ids_B: Tensor | None, first_row: int = 0, first_column: int = 0) -> Tensor:
        """Drop, whatever the mode. ``x``: first dimension the samples; its last two dimensions may be a part.

        ``first_row``, ``first_column``: where in them the part begins. Called again with the same arguments it drops
        the same elements.
        """
        if sample_ids_B is None:
            raise ValueError(f"dropout at {self.site} needs the ids of the samples")
        offsets = (*self.offsets[:-2], self.offsets[-2] + first_row, self.offsets[-1] + first_column)
        return rng.dropout(x, self.probability, self._key, sample_ids_B, offsets)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"probability={self.probability}, site={self.site!r}"

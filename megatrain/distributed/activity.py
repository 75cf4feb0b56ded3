"""What a rank gets done, as counts that only rise: whoever works for long raises them, and the watchdog reads them."""

from __future__ import annotations


class Activity:
    """Of one rank. Raised from any thread, without a lock: that a count has risen is all that anybody goes by.

    ``num_batches``: micro-batches that went through this rank's layers, trained on or evaluated, and samples read for
    them. ``num_transfers``: blocks of state written or read, and checkpoints looked at or removed.
    ``transferred_bytes`` of ``total_bytes``: how much of the state that is being saved or restored.
    ``num_elsewhere``: raised for what other ranks got done while this one waited for them.
    """

    def __init__(self) -> None:
        self.num_batches = self.num_transfers = self.num_elsewhere = 0
        self.transferred_bytes = self.total_bytes = 0

    @property
    def count(self) -> int:
        """All that this rank itself got done."""
        return self.num_batches + self.num_transfers

    def batch(self) -> None:
        """A micro-batch is through, or a sample of one is read."""
        self.num_batches += 1

    def begin_transfer(self, total_bytes: int) -> None:
        """So much state is to be saved, or restored, from here on."""
        self.transferred_bytes, self.total_bytes = 0, total_bytes

    def transfer(self, num_bytes: int = 0) -> None:
        """A block of that is through; or, of no bytes, another piece of such work."""
        self.num_transfers += 1
        self.transferred_bytes += num_bytes

    def elsewhere(self) -> None:
        """Another rank, which this one waits for, got something done."""
        self.num_elsewhere += 1

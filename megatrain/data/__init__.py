"""Tokenised datasets: the Arrow format, its reader, and the global order of samples."""

from megatrain.data.dataset import Dataset, open_dataset

__all__ = ["Dataset", "open_dataset"]

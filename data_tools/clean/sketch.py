"""Short stand-ins for texts: equal texts, or similar ones, share a key; their signatures tell how similar they are.

MinHash: Broder 1997, "On the resemblance and containment of documents". A text is the set of its shingles, runs of
`ngram` words; the similarity of two texts is the Jaccard index of these sets. Under a random permutation of all
shingles, two sets have the same first shingle with just this probability. rensa computes `num_permutations` minima.

Of each, the signature keeps 8 bits (b-bit MinHash: Li and Koenig 2010), which agree by chance in one of 256 cases.
The keys are hashes of bands of minima, taken whole (locality-sensitive hashing: Indyk and Motwani 1998).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

FOUND_PROBABILITY = 0.99
"""With which a pair at the threshold shares a key."""
MARGIN_ERRORS = 2.5
"""Estimates this many standard errors below the threshold still count as reaching it."""
SEED = 0x6D656761
BLOCK_CHARACTERS = 1 << 20

_IDEOGRAPHS = "\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af\\uf900-\\ufaff\\U00020000-\\U0003ffff"
_WORD = re.compile(rf"[^\W{_IDEOGRAPHS}]+|[{_IDEOGRAPHS}]")
_SPACE = re.compile(r"\s")
_ASCII_WORDS = bytes(code if chr(code).isalnum() or code == ord("_") else ord(" ") for code in range(128)) + bytes(128)

Bytes = npt.NDArray[np.uint8]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ExactSketch:
    """Texts are the same if all their characters are: xxh3 (128 bits) of the UTF-8 bytes, nothing normalised."""

    signature_bytes: int = 16
    num_keys: int = 1
    min_equal_bytes: int = 16

    def similarity(self, num_equal_bytes: int) -> float:
        return float(num_equal_bytes == self.signature_bytes)

    def __call__(self, texts: list[str]) -> dict[str, pa.Array]:
        digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
        signatures = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        return _columns(signatures, signatures[:, :8].copy().view("<u8"))


@dataclass(frozen=True)
class MinHashSketch:
    """Texts are the same if the Jaccard index of their shingles is estimated to reach the threshold."""

    threshold: float = 0.8
    num_permutations: int = 256
    ngram: int = 5

    @property
    def signature_bytes(self) -> int:
        return self.num_permutations

    @cached_property
    def rows_per_band(self) -> int:
        """The widest bands by which a pair at the threshold is found with FOUND_PROBABILITY."""
        fitting = [
            rows
            for rows in range(1, self.num_permutations + 1)
            if self.found_probability(self.threshold, rows) >= FOUND_PROBABILITY
        ]
        return max(fitting, default=1)

    def found_probability(self, similarity: float, rows: int) -> float:
        """1 - (1 - s^r)^b: with which two texts share one of b keys at least, each a hash of r minima."""
        return float(1 - (1 - similarity**rows) ** (self.num_permutations // rows))

    @property
    def num_keys(self) -> int:
        """Bands of the signature: pairs that share none are never compared."""
        return self.num_permutations // self.rows_per_band

    @property
    def min_equal_bytes(self) -> int:
        """In how many places signatures of duplicates agree at least."""
        error = math.sqrt(self.threshold * (1 - self.threshold) / self.num_permutations)
        accepted = self.threshold - MARGIN_ERRORS * error
        return math.ceil(self.num_permutations * (accepted * 255 / 256 + 1 / 256))

    def similarity(self, num_equal_bytes: int) -> float:
        """The estimated Jaccard index, what agrees by chance taken off."""
        return max(0.0, (num_equal_bytes / self.num_permutations - 1 / 256) * 256 / 255)

    def __call__(self, texts: list[str]) -> dict[str, pa.Array]:
        import rensa

        shingles = [np.zeros(0, np.uint64), *(shingle_hashes(text, self.ngram) for text in texts)]
        offsets = np.cumsum([len(each) for each in shingles]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(shingles), offsets, num_perm=self.num_permutations, seed=SEED
        )
        minima = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), self.num_permutations)
        return _columns((minima & 0xFF).astype(np.uint8), self._band_keys(minima))

    def _band_keys(self, minima: npt.NDArray[np.uint32]) -> Keys:
        used = minima[:, : self.num_keys * self.rows_per_band].astype(np.uint64)
        bands = used.reshape(len(minima), self.num_keys, self.rows_per_band)
        return _mixed((bands * _multipliers(self.rows_per_band)).sum(axis=2, dtype=np.uint64))


Sketch = ExactSketch | MinHashSketch
"""A tagger whose attributes are `signature` and `keys`, and what they mean."""


def shingle_hashes(text: str, ngram: int) -> Keys:
    """A hash for each run of `ngram` words of the lower-cased text.

    A text with fewer words is one shingle; one without words is itself the shingle.
    """
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, words(text)), np.uint64)
    if len(hashes) == 0:
        return np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
    return run_hashes(hashes, min(ngram, len(hashes)))


def run_hashes(hashes: Keys, length: int) -> Keys:
    """A hash for each run of `length` hashes (or numbers) that stand side by side."""
    num_runs = max(len(hashes) - length + 1, 0)
    runs = np.zeros(num_runs, np.uint64)
    for place, multiplier in enumerate(_multipliers(length)):
        runs += hashes[place : place + num_runs] * multiplier
    return _mixed(runs)


def row_hashes(signatures: Bytes) -> Keys:
    """A hash of each signature; their size is a multiple of 8."""
    rows = np.ascontiguousarray(signatures).view("<u8")
    return _mixed((rows * _multipliers(rows.shape[1])).sum(axis=1, dtype=np.uint64))


def words(text: str) -> Iterator[bytes]:
    """The words of the lower-cased text as UTF-8: runs of letters, digits and underscores.

    Each character of Chinese, Japanese and Korean is a word of its own.
    """
    text = text.lower()
    for start, stop in pairwise(_cuts(text)):
        piece = text[start:stop]
        if piece.isascii():  # many times faster than the pattern
            yield from piece.encode().translate(_ASCII_WORDS).split()
        else:
            yield from map(str.encode, _WORD.findall(piece))


def _cuts(text: str) -> Iterator[int]:
    """Where the text can be cut into pieces of about BLOCK_CHARACTERS, which bounds the memory its words take."""
    position = 0
    while position < len(text):
        yield position
        space = _SPACE.search(text, position + BLOCK_CHARACTERS)
        position = space.end() if space else len(text)
    yield len(text)


def _multipliers(count: int) -> Keys:
    """Odd numbers, always the same ones."""
    return np.array([xxhash.xxh3_64_intdigest(f"{SEED} {place}".encode()) | 1 for place in range(count)], np.uint64)


def _mixed(values: Keys) -> Keys:
    """Every bit of the result depends on every bit of the value (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _columns(signatures: Bytes, keys: Keys) -> dict[str, pa.Array]:
    buffers = [None, pa.py_buffer(np.ascontiguousarray(signatures))]
    key_type = pa.list_(pa.field("item", pa.uint64(), nullable=False), keys.shape[1])
    return {
        "signature": pa.FixedSizeBinaryArray.from_buffers(pa.binary(signatures.shape[1]), len(signatures), buffers),
        "keys": pa.FixedSizeListArray.from_arrays(pa.array(keys.reshape(-1)), type=key_type),
    }

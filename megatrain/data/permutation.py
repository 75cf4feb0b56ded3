"""Shuffles without a table: a bijection of [0, size) that is evaluated at any point, for many sizes and keys at once.

A Feistel network on the smallest grid of rows and columns that holds the size, walked along its cycle until it lands
inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The grid is hardly larger than the size, so
few points walk. Wrapping integer arithmetic alone: the same shuffle on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_NUM_ROUNDS = 6
# 2^64 / golden ratio, odd: successive multiples are spread evenly over the 64-bit integers (SplitMix64's increment).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _32 = (np.uint64(bits) for bits in (27, 30, 31, 32))


def mix(value: Words) -> Words:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): any bit of the input reaches every bit out."""
    mixed = (value ^ (value >> _30)) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _27)) * _FACTORS[1]
    return mixed ^ (mixed >> _31)


def shuffle_keys(seed: int, *numbers: NDArray[np.int64]) -> Words:
    """A key for each row of ``numbers`` (arrays of one length, not negative): equal for equal rows alone."""
    key: Words = mix(np.full(1, seed, dtype=np.uint64) + _GOLDEN)
    for number in numbers:
        key = mix((key ^ number.astype(np.uint64)) + _GOLDEN)
    return key


def shuffle(index: NDArray[np.int64], size: NDArray[np.int64], key: Words) -> NDArray[np.int64]:
    """Where the shuffle of [0, size) chosen by ``key`` sends each index. Arrays of one length; index < size < 2^62."""
    sizes, value = size.astype(np.uint64), index.astype(np.uint64)
    num_rows = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    num_columns = (sizes + (num_rows - np.uint64(1))) // num_rows
    value = _encrypt(value, num_rows, num_columns, key)
    outside = np.flatnonzero(value >= sizes)
    while len(outside):
        value[outside] = _encrypt(value[outside], num_rows[outside], num_columns[outside], key[outside])
        outside = outside[value[outside] >= sizes[outside]]
    return value.astype(np.int64)


def _encrypt(value: Words, num_rows: Words, num_columns: Words, key: Words) -> Words:
    """A bijection of [0, num_rows * num_columns): row and column are shifted in turn, by a hash of the other."""
    row = value // num_columns
    column = value - row * num_columns
    for _ in range(_NUM_ROUNDS // 2):
        key = key + _GOLDEN
        row = _shifted(row, _hash(column, key), num_rows)
        key = key + _GOLDEN
        column = _shifted(column, _hash(row, key), num_columns)
    return row * num_columns + column


def _hash(value: Words, key: Words) -> Words:
    """32 bits: a product and a fold are enough within a round, of which there are several."""
    mixed = (value ^ key) * _FACTORS[0]
    mixed ^= mixed >> _32
    mixed *= _FACTORS[1]
    mixed >>= _32
    return mixed


def _shifted(value: Words, bits: Words, size: Words) -> Words:
    """(value + a number below ``size`` made of 32 random bits) modulo size, without a division."""
    bits *= size
    bits >>= _32
    bits += value
    wrapped: Words = np.minimum(bits, bits - size)  # below size, the difference wraps around and is the larger
    return wrapped

"""Random numbers by counter: fixed forever, slice by slice the same, and random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatrain.distributed import rng

SAMPLES = torch.tensor([11, 12, 90_000_000_000])


def splitmix64(state: int) -> int:
    """The reference, in Python's own integers: https://prng.di.unimi.it/splitmix64.c."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def lowbias32(x: int) -> int:
    """The reference, in Python's own integers: https://nullprogram.com/blog/2018/07/31/."""
    mask = (1 << 32) - 1
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def test_bits_64_are_splitmix64s() -> None:
    key = rng.stream_key(7, "some stream")
    bits = rng.bits_64(key, torch.arange(1, 1001)).tolist()
    golden = 0x9E3779B97F4A7C15
    assert [b % 2**64 for b in bits] == [splitmix64((key + i * golden) % 2**64) for i in range(1000)]


def test_the_mixer_is_lowbias32_for_a_zero_row() -> None:
    row = torch.zeros(1, dtype=torch.int64)
    counters = torch.arange(500, dtype=torch.int32)
    assert [x % 2**32 for x in rng.mix_32(counters, row)[0].tolist()] == [lowbias32(i) for i in range(500)]


@pytest.mark.parametrize("change", [{"seed": 2}, {"name": "other"}])
def test_another_seed_or_name_is_another_stream(change: dict[str, object]) -> None:
    assert rng.stream_key(**{"seed": 1, "name": "one", **change}) != rng.stream_key(1, "one")  # type: ignore[arg-type]


def test_a_slice_has_the_bits_of_the_whole() -> None:
    whole = rng.bits_32(5, SAMPLES, (3, 4, 10, 20), (0, 0, 0))
    part = rng.bits_32(5, SAMPLES[1:], (2, 2, 6, 15), (2, 3, 5))
    assert torch.equal(part, whole[1:, 2:, 3:9, 5:])


def test_samples_rows_and_columns_have_different_bits() -> None:
    bits = rng.bits_32(5, torch.arange(40), (40, 50, 60), (0, 0)).flatten()
    # Of 120,000 32-bit numbers two are equal about 1.7 times by chance.
    assert len(bits) - len(bits.unique()) < 12


def test_dropout_drops_evenly_and_keeps_the_mean() -> None:
    x = torch.ones(64, 100, 128)
    y = rng.dropout(x, 0.3, key=3, sample_ids_B=torch.arange(64) * 1000, offsets=(0, 0))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    kept = (y != 0).double()
    assert kept.mean().item() == pytest.approx(0.7, abs=0.002)
    for dims, num in (((0, 1), 64 * 100), ((0, 2), 64 * 128), ((1, 2), 100 * 128)):
        deviation = (kept.mean(dims) - 0.7).abs().max().item()
        assert deviation < 4.5 * (0.21 / num) ** 0.5


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 16)])
def test_neighbours_are_dropped_independently(shift: tuple[int, int, int]) -> None:
    kept = rng.bits_32(9, torch.arange(65), (65, 101, 144), (0, 0)) >= 0
    moved = kept[shift[0] :, shift[1] :, shift[2] :]
    original = kept[: moved.shape[0], : moved.shape[1], : moved.shape[2]]
    assert _correlation(moved, original) < 0.006


def test_the_gradient_is_dropped_where_the_value_is() -> None:
    x = torch.randn(2, 30, 40, requires_grad=True)
    y = rng.dropout(x, 0.5, 1, torch.tensor([4, 5]), (0, 0))
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)


def test_no_random_state_is_touched() -> None:
    before = torch.get_rng_state()
    rng.dropout(torch.ones(2, 3, 4), 0.5, 1, torch.tensor([4, 5]), (0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


@pytest.mark.slow
def test_compiled_dropout_drops_the_same_elements() -> None:
    """Torch's compiler multiplies indices in integers that do not wrap, unless they are kept from it."""
    x, samples = torch.rand(4, 16, 64), torch.arange(4) + 7
    arguments = (x, 0.2, rng.stream_key(1, "a"), samples, (16, 0))
    compiled = torch.compile(rng.dropout, fullgraph=True)(*arguments)
    assert torch.equal(compiled, rng.dropout(*arguments))

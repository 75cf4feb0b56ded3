"""Datasets of 10^12 tokens: sparse files, each shard's tokens a hole but for its number."""

from __future__ import annotations

import random
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks._sparse_dataset import EOD_ID, write_sparse_dataset
from megatrain.data import Dataset, open_dataset
from megatrain.data.format import shard_name
from megatrain.data.storage import MAPPED_SHARDS

QUICK = pytest.param(300, 10**7, 100, id="300 shards")
SLOW = pytest.param(
    10_000, 10**8, MAPPED_SHARDS, marks=[pytest.mark.slow, pytest.mark.acceptance], id="10^12 tokens in 10^4 shards"
)
LONG = pytest.param(
    100_000,
    10**7,
    MAPPED_SHARDS,
    marks=[
        pytest.mark.slow,
        pytest.mark.timeout(1800),
        pytest.mark.acceptance,
    ],
    id="10^12 tokens in 10^5 shards",
)


def num_mapped_shards(folder: Path) -> int:
    return sum(f"{folder}/shard-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def check_window(dataset: Dataset, half: int, start: int, length: int) -> None:
    """Compare a window with what is known of every position."""
    window = dataset.window(start, length)
    expected = np.zeros(length, np.uint16)
    for document in range(start // half, (start + length) // half + 1):
        shard = document // 2
        known = [(0, shard & 0xFFFF), (1, shard >> 16), (half - 1, EOD_ID)]
        for offset, token in known:
            if start <= document * half + offset < start + length:
                expected[document * half + offset - start] = token
    assert np.array_equal(window, expected)
    begins = [k * half - start for k in range(-(-start // half), -(-(start + length) // half))]
    assert dataset.document_starts(start, length).tolist() == begins
    assert dataset.document_at(start) == start // half


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts the maps as Linux tells them")
@pytest.mark.parametrize(("num_shards", "shard_tokens", "max_mapped"), [QUICK, SLOW, LONG])
def test_huge_datasets_need_bounded_memory_and_maps(
    num_shards: int, shard_tokens: int, max_mapped: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(shutil.rmtree, tmp_path / "data"))
    write_sparse_dataset(tmp_path / "data", num_shards, shard_tokens)
    half, num_windows, apart = shard_tokens // 2, 3 * max_mapped, num_shards // 30
    before = anonymous_bytes()
    num_files = psutil.Process().num_fds()
    dataset = open_dataset(tmp_path / "data", max_mapped_shards=max_mapped)
    assert dataset.num_tokens == num_shards * shard_tokens
    last = dataset.num_tokens - 100
    rng = random.Random(3)
    held = [dataset.window(k * shard_tokens, 2) for k in range(1, num_shards, apart)]
    borders = (max(rng.randrange(2 * num_shards) * half - 50, 0) for _ in range(num_windows // 2))
    anywhere = (rng.randrange(last) for _ in range(num_windows // 2))
    for start in (0, last, *borders, *anywhere):
        check_window(dataset, half, start, 100)
    assert num_mapped_shards(tmp_path / "data") <= max_mapped + len(held) + 1 < num_shards
    assert psutil.Process().num_fds() <= num_files + 1
    assert anonymous_bytes() - before < 64e6
    for k, window in zip(range(1, num_shards, apart), held, strict=True):
        assert window.tolist() == [k & 0xFFFF, k >> 16], "a view outlives its shard's place among those that are mapped"
    del dataset, held, window
    assert num_mapped_shards(tmp_path / "data") == 0


def test_no_shard_is_read_before_it_is_needed(tmp_path: Path) -> None:
    write_sparse_dataset(tmp_path / "data", 40, 3_000_000)
    for index in range(3, 40):
        (tmp_path / "data" / shard_name(index)).unlink()
    dataset = open_dataset(tmp_path / "data")
    assert dataset.num_documents == 80
    lengths = np.concatenate(list(islice(dataset.document_lengths(), 6)))
    assert lengths.tolist() == [1_500_000] * 6

"""verify: whatever bit is wrong is found, its place is named; in parallel, and in samples that can be repeated."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from data_samples import WRITERS, Document, MakeDataset, RunCommand

from data_tools import verify
from data_tools.executors import Advance
from data_tools.verify import verify_dataset
from megatrain.data import open_dataset
from megatrain.data.format import shard_name
from megatrain.errors import DataError

FLIPS = [25, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.acceptance])]


@pytest.fixture
def dataset_path(tmp_path: Path, documents: list[Document], make_dataset: MakeDataset) -> Path:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", documents)
    make_dataset(tmp_path / "a.jsonl", tmp_path / "dataset", shard_tokens=4_000)
    return tmp_path / "dataset"


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    yield lambda amount: None


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("num_flips", FLIPS)
def test_every_flipped_bit_is_found(num_flips: int, dataset_path: Path) -> None:
    rng = random.Random(num_flips)
    files = sorted(path for path in dataset_path.iterdir() if path.is_file())
    bounds = [path.stat().st_size for path in files]
    missed = []
    for _ in range(num_flips):
        path = rng.choices(files, bounds)[0]
        position, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, position, bit)
        try:
            verify_dataset(str(dataset_path), silent)
            missed.append((path.name, position, bit))
        except DataError as error:
            if path.name not in str(error):
                missed.append((path.name, position, str(error)))
        flip(path, position, bit)
    assert not missed
    verify_dataset(str(dataset_path), silent)


def test_damage_in_a_shard_is_located_by_bytes(dataset_path: Path) -> None:
    path = dataset_path / shard_name(1)
    for position in range(3, path.stat().st_size, path.stat().st_size // 15):
        flip(path, position, 5)
        with pytest.raises(DataError, match=r"bytes \d+ to \d+") as caught:
            verify_dataset(str(dataset_path), silent)
        bounds = [tuple(map(int, span)) for span in re.findall(r"bytes (\d+) to (\d+)", str(caught.value))]
        assert any(first <= position < last for first, last in bounds), (position, str(caught.value))
        flip(path, position, 5)


def test_workers_find_what_one_finds(dataset_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "BYTES_PER_WORKER", 1)
    opened, num_bytes = verify_dataset(str(dataset_path), silent, num_workers=2)
    assert num_bytes == sum(row["bytes"] for row in opened.shard_rows())
    for index in (0, 3):
        flip(dataset_path / shard_name(index), 1500, 0)
    messages = []
    for num_workers in (1, 2):
        with pytest.raises(DataError, match=r"(?s)shard-000000.*shard-000003") as caught:
            verify_dataset(str(dataset_path), silent, num_workers=num_workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_sampled_verification_is_reproducible_and_finds_damage(dataset_path: Path, run_command: RunCommand) -> None:
    dataset = open_dataset(dataset_path)
    num_batches = int(dataset.table.batch_starts[-1])
    shard, number = 2, 0
    place = dataset.table.batches(shard)[number]
    flip(dataset_path / shard_name(shard), place.offset + place.num_bytes // 2, 1)
    found = {}
    for seed in range(12):
        codes = {run_command("verify", dataset_path, "--sample", 2, "--seed", seed)[0] for _ in range(2)}
        assert len(codes) == 1
        found[seed] = codes.pop()
    assert set(found.values()) == {0, 3}, "a sample of 2 finds it with some seeds, and not with others"
    code, _, err = run_command("verify", dataset_path, "--sample", num_batches + 5)
    assert code == 3
    assert f"{shard_name(shard)}, record batch 0" in err


def test_a_resized_or_missing_shard_is_named(dataset_path: Path) -> None:
    path = dataset_path / shard_name(1)
    data = path.read_bytes()
    for broken in (data + b"\0", data[:-1], data[: len(data) // 2], b""):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=shard_name(1)):
            verify_dataset(str(dataset_path), silent)
    path.unlink()
    with pytest.raises(DataError, match=shard_name(1)):
        verify_dataset(str(dataset_path), silent)
    shutil.copy(dataset_path / shard_name(0), path)
    with pytest.raises(DataError, match=shard_name(1)):
        verify_dataset(str(dataset_path), silent)
    os.truncate(path, 0)
    with pytest.raises(DataError, match=shard_name(1)):
        verify_dataset(str(dataset_path), lambda *_: nullcontext(lambda _: None), sample=1000)

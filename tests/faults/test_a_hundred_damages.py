"""Whatever becomes of a checkpoint's bytes on disk: it is found, named, and never loaded in silence."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.store import PosixStore
from megatrain.errors import CheckpointError
from tests.faults.traced_save import fragments, save

NUM_DAMAGES = 100


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2, whose values differ."""
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    store = PosixStore(folder)
    store.open_generation()
    for step in (1, 2):
        path = save(store, step)
        assert path is not None
        shutil.copytree(path, folder.parent / "kept" / path.name)
    shutil.rmtree(folder)
    return shutil.copytree(folder.parent / "kept", folder)


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _delete(path: Path, _: random.Random) -> None:
    path.unlink()


def _swap(path: Path, _: random.Random) -> None:
    """The file of the other checkpoint, which is whole; or, where it is the same, another file."""
    other = path.parent.with_name("step-00000001") / path.name
    source = other if other.read_bytes() != path.read_bytes() else path.with_name("manifest.json")
    shutil.copy(source, path)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (_flip, _flip, _cut, _delete, _swap)


def _cases() -> Iterator[tuple[str, int]]:
    names = ("rank-00000.safetensors", "manifest.json", "tokenizer.json")
    for number in range(NUM_DAMAGES):
        yield names[number // len(DAMAGES) % len(names)], number


def test_no_damage_loads_silently(original: Path, tmp_path: Path) -> None:
    silent, unnamed = [], []
    for name, number in _cases():
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        path = folder / "step-00000002" / name
        damage = DAMAGES[number % len(DAMAGES)]
        damage(path, random.Random(number))
        case = f"{number}: {damage.__name__} {name}"
        problems, _, _ = verify(path.parent)
        if not any(name in problem for problem in problems):
            unnamed.append(case)
        try:
            reader = CheckpointReader(path.parent)
            for fragment in fragments(2):
                reader.read(fragment.shard, fragment.kind)
            reader.read_file("tokenizer.json")
            silent.append(case)
        except CheckpointError as error:
            assert name in str(error), case
        shutil.rmtree(folder)
    assert silent == []
    assert unnamed == []


def test_reading_finds_the_newest_good_checkpoint(original: Path, tmp_path: Path) -> None:
    for name, number in [case for case in _cases() if case[1] % 4 == 0]:
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        path = folder / "step-00000002" / name
        DAMAGES[number % len(DAMAGES)](path, random.Random(number))
        store = PosixStore(folder)
        damaged = {path.parent: verify(path.parent)[0][0]}
        newest = store.newest_good(damaged)
        assert newest is not None
        assert newest.step == 1
        shutil.rmtree(folder)

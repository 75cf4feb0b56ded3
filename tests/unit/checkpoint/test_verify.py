from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import write_checkpoint

from megatrain import cli
from megatrain.checkpoint.manifest import read_manifest
from tests.in_process import caller

NUM_FLIPS = 40


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, str]]:
    """Runs `megatrain checkpoint verify` in this process: exit code and standard error."""

    call = caller("megatrain", cli.main, monkeypatch, capfd)

    def run(path: Path) -> tuple[int, str]:
        ended = call("checkpoint", "verify", path)
        return ended.code, ended.err

    return run


def test_one_flipped_bit_names_its_file(tmp_path: Path, verify: Callable[[Path], tuple[int, str]]) -> None:
    folder = write_checkpoint(tmp_path, 1)
    assert verify(folder) == (0, "")
    files = sorted(folder.iterdir())
    chance = random.Random(5)
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        position, bit = chance.randrange(len(whole)), chance.randrange(8)
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        code, message = verify(folder)
        assert code == 4, (path.name, position, bit)
        assert path.name in message, (message, position, bit)
        assert "Traceback" not in message
        path.write_bytes(whole)
    assert verify(folder) == (0, "")


@pytest.mark.parametrize("change", ["missing", "cut", "longer", "empty", "stray"])
def test_missing_unknown_or_resized_files_are_named(
    change: str, tmp_path: Path, verify: Callable[[Path], tuple[int, str]]
) -> None:
    folder = write_checkpoint(tmp_path, 1)
    path = folder / "rank-00001.safetensors"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "stray":
        path = folder / "left-behind.bin"
        path.write_bytes(b"x")
    else:
        path.write_bytes({"cut": content[:-1], "longer": content + b"x", "empty": b""}[change])
    code, message = verify(folder)
    assert code == 4
    assert path.name in message


def test_an_oversized_file_beside_pieces_is_refused(tmp_path: Path, verify: Callable[[Path], tuple[int, str]]) -> None:
    path = write_checkpoint(tmp_path, 1) / "tokenizer.json"
    manifest = read_manifest(path.parent)
    os.truncate(path, 1 << 40)  # a file of holes
    entries = [
        entry.model_copy(update={"bytes": 1 << 40}) if entry.file == path.name else entry for entry in manifest.files
    ]
    (path.parent / "manifest.json").write_bytes(manifest.model_copy(update={"files": tuple(entries)}).encode())
    assert verify(path.parent) == (
        4,
        f"{path}: 1,099,511,627,776 bytes are too many for a file beside the rank files.\n",
    )


def test_of_a_run_every_checkpoint_is_verified(tmp_path: Path, verify: Callable[[Path], tuple[int, str]]) -> None:
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    assert verify(tmp_path) == (0, "")
    (newest / "manifest.json").write_bytes(b"{}")
    code, message = verify(tmp_path)
    assert code == 4
    assert str(newest / "manifest.json") in message


def test_nfs_remains_of_deleted_files_are_no_damage(tmp_path: Path, verify: Callable[[Path], tuple[int, str]]) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / ".nfs00000000052a1b3c00000007").write_bytes(b"still open elsewhere")
    assert verify(folder) == (0, "")

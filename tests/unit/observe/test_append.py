import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatrain.observe.append import AppendFile


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_record_is_on_file_once_append_returns(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "sub" / "file")
    file.append(b"one\n")
    assert (tmp_path / "sub" / "file").read_bytes() == b"one\n"
    file.append(b"two\n")
    assert (tmp_path / "sub" / "file").read_bytes() == b"one\ntwo\n"
    file.close()


def test_a_full_disk_loses_no_record(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 40_000)
    records = [f"{number:05d} ".encode() + b"r" * 1000 + b"\n" for number in range(60)]
    file = AppendFile(small_disk / "file")
    for record in records[:50]:
        file.append(record)
    text = (small_disk / "file").read_bytes()
    assert text == b"".join(records[: len(text) // len(records[0])])
    assert len(text) < 50 * len(records[0])
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text

    ballast.unlink()
    for record in records[50:]:
        file.append(record)
    file.close()
    assert (small_disk / "file").read_bytes() == b"".join(records)
    assert len(caplog.records) == 2


def test_a_folder_that_is_a_file_is_retried(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    file = AppendFile(tmp_path / "logs" / "file")
    file.append(b"one\n")
    (tmp_path / "logs").unlink()
    file.append(b"two\n")
    assert (tmp_path / "logs" / "file").read_bytes() == b"one\ntwo\n"
    file.close()


def test_held_back_records_are_bounded_newest_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("in the way")
    file = AppendFile(tmp_path / "logs" / "file", max_pending_bytes=100)
    for number in range(50):
        file.append(f"{number:09d}\n".encode())
    (tmp_path / "logs").unlink()
    file.close()
    assert (tmp_path / "logs" / "file").read_text().split() == [f"{number:09d}" for number in range(40, 50)]
    assert "40 records were lost" in caplog.text


def test_a_device_without_room_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    file = AppendFile(Path("/dev/full"))
    file.append(b"one\n")
    file.append(b"two\n")
    file.close()
    assert caplog.text.count("cannot write /dev/full") == 1

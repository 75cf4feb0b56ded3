"""A disk of a given size: a tmpfs, where mounting is permitted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a disk of ``num_bytes`` at ``folder``; the test is skipped where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if refused.returncode:
        pytest.skip(f"mounting is not permitted here: {refused.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, but: int) -> Path:
    """Leave ``but`` bytes free; the file that takes the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        free = int(subprocess.run(["df", "--output=avail", "-B1", disk], capture_output=True).stdout.split()[-1])
        file.write(bytes(free - but))
    return ballast

"""Files and folders that appear whole or not at all: written under a hidden name, synced, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def committed(
    path: Path, scratch: Path | None = None, *, single_writer: bool = False, durable: bool = True
) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` in one rename once it is whole and on disk.

    The unfinished file lies in `scratch` (on the same file system), or beside `path`. If the body fails, it is removed.
    `single_writer`: nobody else writes `path` meanwhile, so that what a kill leaves is overwritten by the next try.
    `durable`: where false, nothing waits for the disk, and a power cut may leave less than the whole.
    """
    # Processes on other machines may have this one's number.
    writer = "" if single_writer else f".{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = (scratch or path.parent) / f".{path.name}{writer}.tmp"
    try:
        yield unfinished
        if durable:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def commit_bytes(
    path: Path, data: bytes, scratch: Path | None = None, *, single_writer: bool = False, durable: bool = True
) -> None:
    """Write `data` to `path`: either all of it gets there, or nothing. See `committed`."""
    with committed(path, scratch, single_writer=single_writer, durable=durable) as unfinished:
        unfinished.write_bytes(data)


def commit_first(path: Path, data: bytes) -> None:
    """Write `data` to `path`, unless another process has written something there first: whole in both cases."""
    private = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with private.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(private)
        except FileExistsError:
            return
    finally:
        private.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder, which becomes `path` in one rename. The body syncs the files that it writes into it.

    For one process alone: what a killed one left is removed first.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        sync_folder(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""`--check`: all that is wrong with inputs, storage and room, before hours of work stop at the first of it."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

from data_tools.clean.report import REPORT_FOLDER
from data_tools.executors import Advance, Progress
from data_tools.folder import WORK_FOLDER
from data_tools.inputs import FileSelector, InputFile, find_inputs
from data_tools.outputs import NO_ROOM, refuse_occupied, refuse_overlap
from data_tools.readers import plan_units, read_parts
from data_tools.units import BadRow, ImageRecord, ReadOptions, Record, Unit
from data_tools.work import run_tasks
from megatrain.data.format import MANIFEST_FILE
from megatrain.errors import ConfigError, DataError, MegatrainError
from megatrain.units import format_bytes

TRIAL = bytes(range(256)) * 256
KEEP_SIZE = 1
"""Of fallocate: room is reserved, and nothing written."""
IN_MEMORY = ("tmpfs", "ramfs")


Resolve = Callable[[ReadOptions, list[InputFile]], tuple[ReadOptions, list[InputFile]]]


class Checked(NamedTuple):
    """What was found in a unit."""

    num_documents: int
    problems: dict[str, list[str]]
    """By file: what is wrong with the first row that cannot be read, and nothing for each further one."""


def check_unit(options: ReadOptions, unit: Unit, advance: Advance) -> Checked:
    num_documents = 0
    problems: dict[str, list[str]] = {}
    for _, row in (row for part in read_parts(unit, options, keep_bad_rows=True) for row in part.rows):
        num_documents += isinstance(row, Record | ImageRecord)
        if isinstance(row, BadRow):
            found = problems.setdefault(unit.files[row.file].name, [])
            found.append("" if found else str(row.error()))
    advance(unit.num_bytes)
    return Checked(num_documents, problems)


class Storage(NamedTuple):
    """Where a command writes."""

    out: Path
    is_folder: bool
    bytes_per_text: float
    """About how much it takes for each byte of text."""


def check_command(
    inputs: Sequence[str],
    options: ReadOptions,
    storage: Storage,
    others: Sequence[Callable[[], object]],
    num_workers: int,
    progress: Progress,
    say: Callable[[str], None],
    resolve: Resolve | None = None,
) -> None:
    """Look at all that a command needs: its inputs, read as it would; the storage; and whatever `others` look at.

    Tells of each file that the command would stop at, and of all else that is wrong. Raises an error where something
    is. Nothing that is written stays. `resolve`: completes the options by the files, and picks those of rows.
    """
    problems: list[MegatrainError] = []
    named = [each for each in inputs if _passes(partial(find_inputs, [each], *_selection(options)), problems)]
    files = find_inputs(named, *_selection(options), say) if named else []
    if resolve is not None:
        try:
            options, files = resolve(options, files)
        except MegatrainError as error:
            problems, files = [*problems, error], []
    units = list(plan_units(files, errors="skip"))
    needed = int(storage.bytes_per_text * sum(unit.text_bytes for unit in units))
    _passes(partial(refuse_overlap, storage.out, named, files), problems)
    _passes(partial(_check_place, storage), problems)
    _passes(partial(_check_storage, storage.out, needed), problems)
    for check in others:
        _passes(check, problems)
    rows_are = "documents" if resolve is None else "images"
    num_documents, unreadable = _check_units(units, options, num_workers, progress)
    for found in unreadable.values():
        say(f"{found[0]} ({len(found)} rows of this file cannot be read.)" if len(found) > 1 else found[0])
    if unreadable:
        rows = sum(map(len, unreadable.values()))
        problems.append(
            DataError(
                f"{len(unreadable)} of {len(files)} files have something that cannot be read, {rows} rows in all; "
                f"{num_documents} {rows_are} can. --errors skip leaves such rows out."
            )
        )
    for problem in problems[:-1]:
        say(str(problem))
    if problems:
        raise problems[-1]
    say(f"All of it can be read: {num_documents} {rows_are}.")


def _selection(options: ReadOptions) -> tuple[FileSelector, str]:
    return options.selection, options.text_key


def _passes(check: Callable[[], object], problems: list[MegatrainError]) -> bool:
    try:
        check()
    except MegatrainError as error:
        problems.append(error)
        return False
    return True


def _check_units(
    units: list[Unit], options: ReadOptions, num_workers: int, progress: Progress
) -> tuple[int, dict[str, list[str]]]:
    """How many documents can be read, and by file what is wrong with rows that cannot."""
    options = options if options.errors == "replace" else replace(options, errors="skip")
    num_documents = 0
    unreadable: dict[str, list[str]] = {}
    with progress("check", sum(unit.num_bytes for unit in units)) as advance:
        for checked in run_tasks(partial(check_unit, options), units, num_workers, advance):
            num_documents += checked.num_documents
            for name, found in checked.problems.items():
                unreadable.setdefault(name, []).extend(found)
    return num_documents, unreadable


def _check_place(storage: Storage) -> None:
    out = storage.out
    in_the_way = next((path for path in out.absolute().parents if path.exists() and not path.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"--out {out} cannot be made: {in_the_way} is a file. Give another place.")
    if storage.is_folder:
        if not (out / MANIFEST_FILE).exists() and not (out / REPORT_FOLDER).exists():
            refuse_occupied(out, out / WORK_FOLDER)
    elif not out.parent.is_dir():
        raise ConfigError(f"There is no folder {out.parent} for --out {out}: make it first.")


def _check_storage(out: Path, needed: int) -> None:
    """Try there what a command does: make a folder, write, fsync, rename, read; and see whether there is room."""
    there = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    step = "make a folder"
    try:
        with TemporaryDirectory(prefix=".megatrain-check-", dir=there, ignore_cleanup_errors=True) as folder:
            step = "write and fsync"
            path = Path(folder, "written")
            with path.open("wb") as file:
                file.write(TRIAL)
                file.flush()
                os.fsync(file.fileno())
            step = "rename"
            path = path.rename(Path(folder, "renamed"))
            step = "read"
            if path.read_bytes() != TRIAL:
                raise OSError(errno.EIO, "it gives other bytes than were written")
            step = f"reserve the {format_bytes(needed)} that are needed"
            _reserve(Path(folder, "reserved"), needed)
    except OSError as error:
        raise DataError(
            f"--out {out}: the storage at {there} cannot {step}: {error.strerror or error}. Make it possible there "
            "(access, quota, room), or give another place."
        ) from None


def _reserve(path: Path, num_bytes: int) -> None:
    """Raise OSError where there is no room for so many bytes, by what the disk says, and by the quota.

    The quota is asked by reserving the room, for a moment, where the file system can do that without writing.
    """
    free = os.statvfs(path.parent)
    if free.f_bavail * free.f_frsize < num_bytes:
        free_bytes = format_bytes(free.f_bavail * free.f_frsize)
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free_bytes} are free")
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    if max(mounts, key=lambda part: len(part.mountpoint)).fstype in IN_MEMORY or not num_bytes:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("wb") as file:
        size = ctypes.c_int64(num_bytes)
        if libc.fallocate(file.fileno(), KEEP_SIZE, ctypes.c_int64(0), size) and ctypes.get_errno() in NO_ROOM:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

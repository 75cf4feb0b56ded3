"""The folder of a run's checkpoints: which exist, which are good, how one appears and how one goes.

A checkpoint is written under a hidden name and appears under its own by one rename, when all of it is on disk. It goes
the same way: renamed to a hidden name first, then deleted. So a name that a reader sees is always a whole checkpoint,
and what a killed save or a killed deletion leaves is hidden, and removed at the next start.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import xxhash

from megatrain.checkpoint.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from megatrain.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"
_DELETED = ".deleted-"


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint that a run has; ``problem``: why it cannot be used, None if it looks whole."""

    step: int
    path: Path
    problem: str | None

    @property
    def good(self) -> bool:
        """Whether its manifest is sound and every file has its size (contents are checked as they are read)."""
        return self.problem is None


class CheckpointStore:
    """The checkpoints of one run, under ``RUN/checkpoints``, on a POSIX file system that all ranks see."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"

    def list(self) -> list[CheckpointFolder]:
        """All checkpoints of the run, oldest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_dir():
                found.append(CheckpointFolder(int(match[1]), path, _find_problem(path)))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest_good(self, damaged: Mapping[Path, str] = MappingProxyType({})) -> CheckpointFolder | None:
        """The newest checkpoint to resume from, None where there is none at all.

        ``damaged``: those that turned out so on reading, and why. Raises CheckpointError where there are checkpoints,
        but none is good: starting afresh would be no answer.
        """
        every = self.list()
        good = [checkpoint for checkpoint in every if checkpoint.good and checkpoint.path not in damaged]
        if good:
            return good[-1]
        if every:
            last = every[-1]
            raise CheckpointError(
                f"{self.folder} has {len(every)} checkpoint(s), and none is good; the newest: "
                f"{last.problem or damaged[last.path]} Restore one, or start again in another run.dir."
            )
        return None

    def begin(self, step: int) -> Path:
        """Make the hidden folder that the ranks write their files into; the first of them makes it."""
        path = self.unfinished(step)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def unfinished(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is written before it appears."""
        return self.folder / f"{_UNFINISHED}{step:08d}"

    def finished(self, step: int) -> Path:
        """Where the checkpoint of ``step`` appears."""
        return self.folder / f"step-{step:08d}"

    def commit(self, manifest: Manifest) -> Path:
        """Let the checkpoint appear: manifest last, every folder synced, one rename. Raises OSError.

        One that stands under the name already (a save was repeated after going back) is replaced.
        """
        source, target = self.unfinished(manifest.step), self.finished(manifest.step)
        write_synced(source / MANIFEST, manifest.encode())
        sync_folder(source)
        if target.exists():
            self._remove(target)
        source.rename(target)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        return target

    def abandon(self, step: int) -> None:
        """Remove what a failed save left."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)

    def clean(self) -> None:
        """Remove what killed saves and deletions left. Only for the start, when nobody writes."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_UNFINISHED, _DELETED)):
                    shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep: int, last_step: int) -> None:
        """Of the good checkpoints up to ``last_step``, delete all but the newest ``keep`` (at least one stays).

        Damaged ones stay to be seen. So do later ones: the run went back because it could not read them.
        """
        good = [checkpoint for checkpoint in self.list() if checkpoint.good and checkpoint.step <= last_step]
        for checkpoint in good[: -max(keep, 1)]:
            self._remove(checkpoint.path)

    def _remove(self, path: Path) -> None:
        hidden = path.with_name(f"{_DELETED}{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint folder, by its manifest or by its name (a damaged one has no manifest)."""
    return (path / MANIFEST).exists() or (path.is_dir() and _NAME.fullmatch(path.name) is not None)


def resolve(path: Path) -> Path:
    """The checkpoint folder that a user means by ``path``: itself, or the newest good one of a run folder.

    Raises CheckpointError where it is neither.
    """
    if is_checkpoint(path):
        read_manifest(path)
        return path
    store = CheckpointStore(path)
    if path.name == "checkpoints" and not store.folder.is_dir():
        store = CheckpointStore(path.parent)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a checkpoint folder (RUN/checkpoints/step-...) or a run folder."
        )
    newest = store.newest_good()
    if newest is None:
        raise CheckpointError(f"{path} is neither a checkpoint (no {MANIFEST}) nor a run folder with checkpoints.")
    return newest.path


def add_file(folder: Path, name: str, content: bytes) -> FileEntry:
    """Write a small file beside the pieces, synced; its entry for the manifest. Raises OSError."""
    write_synced(folder / name, content)
    return FileEntry(file=name, bytes=len(content), checksum=xxhash.xxh3_128(content).hexdigest())


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it. Raises OSError."""
    with path.open("xb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_problem(path: Path) -> str | None:
    try:
        for entry in read_manifest(path).files:
            size = (path / entry.file).stat().st_size
            if size != entry.bytes:
                return f"{path / entry.file} has {size:,} bytes instead of {entry.bytes:,}."
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})."
    return None

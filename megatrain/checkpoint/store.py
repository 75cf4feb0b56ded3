"""The checkpoints of a run: which exist, which are good, how one appears and how one goes.

A checkpoint is written where no reader looks, and appears at once when all of it is on disk: `PosixStore` renames a
folder, `ObjectStore` (object_store.py) puts its manifest. Each start of a run opens a new generation and fences the one
before: what a job still writes that was cut off and left behind cannot appear any more.
"""

from __future__ import annotations

import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from megatrain.atomic import sync_folder
from megatrain.checkpoint.location import Location, exists, list_folder, store_errors, write_file
from megatrain.checkpoint.manifest import MANIFEST, NAME, FileEntry, Manifest, folder_name, read_manifest
from megatrain.distributed.activity import Activity
from megatrain.errors import CheckpointError, Superseded, Unreachable

_GENERATION = re.compile(r"\.generation-(\d+)-[0-9a-f]+")
_DELETED = ".deleted-"
_ASIDE = "set-aside-"
_MAX_SMALL_BYTES = 256 << 20


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint that a run has; ``problem``: why it cannot be used, None if it looks whole. ``manifest``:
    what it says, where that can be read."""

    step: int
    path: Location
    problem: str | None
    manifest: Manifest | None = None

    @property
    def good(self) -> bool:
        """Whether its manifest is sound and every file has its size (contents are checked as they are read)."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """What `megatrain checkpoint list --json` says of it."""
        known = self.manifest.model_dump(include={"tokens", "validation_loss"}) if self.manifest else {}
        return {
            "step": self.step,
            "tokens": None,
            "validation_loss": None,
            **known,
            "path": str(self.path),
            "good": self.good,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest ``last``, those of every n-th step, the ``best`` by validation loss, and
    each that was saved on request."""

    last: int = 1
    every_steps: int | None = None
    best: int = 0


class CheckpointStore(ABC):
    """The checkpoints of one run, in a folder or a store that all ranks see."""

    folder: Location
    generation: str = ""
    """The name of the generation that this start writes into; empty where it only reads."""
    activity: Activity
    """Told of each checkpoint that is looked at or removed."""

    @abstractmethod
    def names(self) -> Iterator[tuple[int, Location]]:
        """Step and path of every checkpoint that has appeared, in no order."""

    @abstractmethod
    def open_generation(self) -> str:
        """Fence all earlier starts of the run, remove what they left unfinished, and begin to write. Rank 0, once."""

    def join(self, generation: str) -> None:
        """Write into the generation that rank 0 has opened."""
        self.generation = generation

    @abstractmethod
    def begin(self, step: int) -> Location:
        """The hidden folder that the ranks write the files of ``step`` into. Raises Superseded."""

    @abstractmethod
    def commit(self, manifest: Manifest) -> Location:
        """Let the checkpoint appear, every file of which is on disk: manifest last. Raises Superseded, OSError."""

    @abstractmethod
    def abandon(self, step: int) -> None:
        """Remove what a failed save left."""

    @abstractmethod
    def remove(self, path: Location) -> None:
        """Delete a checkpoint: it disappears at once, its bytes after that."""

    @abstractmethod
    def set_aside(self, after: int) -> Sequence[CheckpointFolder]:
        """Take the checkpoints after a step out of the run, newest first; what was taken and where it is now."""

    @abstractmethod
    def path_of(self, step: int) -> Location:
        """Where what this start saves at ``step`` appears."""

    @abstractmethod
    def refuse_if_superseded(self) -> None:
        """Raise Superseded if a later start has fenced this one."""

    def find(self, step: int) -> Location:
        """Where the checkpoint of ``step`` is. Raises CheckpointError where there is none."""
        found = [path for number, path in self.names() if number == step]
        if not found:
            steps = ", ".join(str(number) for number, _ in sorted(self.names())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has: {steps}.")
        return found[0]

    def list(self) -> list[CheckpointFolder]:
        """All checkpoints of the run, oldest first."""
        found = []
        for step, path in self.names():
            found.append(CheckpointFolder(step, path, *_look(path)))
            self.activity.transfer()
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest_good(self, damaged: Mapping[Location, str] = MappingProxyType({})) -> CheckpointFolder | None:
        """The newest checkpoint to resume from, None where there is none at all.

        ``damaged``: those that turned out so on reading, and why. Raises CheckpointError where there are checkpoints,
        but none is good: starting afresh would be no answer.
        """
        newest_problem = None
        for step, path in sorted(self.names(), key=lambda found: found[0], reverse=True):
            problem = damaged.get(path) or find_problem(path)
            self.activity.transfer()
            if problem is None:
                return CheckpointFolder(step, path, None)
            newest_problem = newest_problem or problem
        if newest_problem is not None:
            raise CheckpointError(
                f"{self.folder} has {len(list(self.names()))} checkpoint(s), and none is good; the newest: "
                f"{newest_problem} Restore one, or start again in another run.dir."
            )
        return None

    def prune(self, retention: Retention) -> None:
        """Delete the good checkpoints that ``retention`` does not keep (one stays at least); damaged ones stay to be
        seen."""
        newest_first = sorted(self.names(), key=lambda found: found[0], reverse=True)
        num_good, old = 0, []
        for step, path in newest_first:
            if num_good < max(retention.last, 1):
                num_good += find_problem(path) is None
            elif not (retention.every_steps and step % retention.every_steps == 0):
                old.append(path)
        read = [path for _, path in newest_first] if retention.best else old
        manifests = {path: manifest for path in read if (manifest := _readable(path))}
        best = best_of(manifests, retention.best)
        for path in old:
            manifest = manifests.get(path)
            if manifest and not manifest.on_request and path not in best and find_problem(path) is None:
                self.remove(path)
                self.activity.transfer()

    def _superseded(self) -> Superseded:
        return Superseded(
            f"A later start of this run has taken over {self.folder}: this one can save nothing any more, and ends."
        )


class PosixStore(CheckpointStore):
    """Checkpoints in a folder of a POSIX file system; a shared one where the run has several nodes.

    A generation is a hidden folder; ranks write below it, and never make it. A later start renames it away, in one
    moment for all ranks, wherever they are: a save under way then fails, and a late commit finds nothing to rename.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.activity = Activity()

    def names(self) -> Iterator[tuple[int, Path]]:
        with store_errors(self.folder):
            found = [*self.folder.iterdir()] if self.folder.is_dir() else []
        for path in found:
            if (match := NAME.fullmatch(path.name)) and path.is_dir():
                yield int(match[1]), path

    def open_generation(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        last = 0
        for path in list(self.folder.iterdir()):
            if match := _GENERATION.fullmatch(path.name):
                last = max(last, int(match[1]))
                path.rename(path.with_name(f"{_DELETED}{path.name[1:]}"))
        self.generation = f".generation-{last + 1:05d}-{secrets.token_hex(4)}"
        (self.folder / self.generation).mkdir()
        sync_folder(self.folder)
        for path in self.folder.iterdir():
            if path.name.startswith(_DELETED):
                shutil.rmtree(path, ignore_errors=True)
        return self.generation

    def begin(self, step: int) -> Path:
        path = self._unfinished(step)
        try:
            path.mkdir(exist_ok=True)
        except FileNotFoundError:
            self.refuse_if_superseded()
            raise
        return path

    def commit(self, manifest: Manifest) -> Path:
        source, target = self._unfinished(manifest.step), self.path_of(manifest.step)
        write_file(source / MANIFEST, manifest.encode())
        sync_folder(source)
        source.rename(target)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        return target

    def abandon(self, step: int) -> None:
        shutil.rmtree(self._unfinished(step), ignore_errors=True)

    def remove(self, path: Location) -> None:
        assert isinstance(path, Path)
        hidden = path.with_name(f"{_DELETED}{path.name}-{secrets.token_hex(4)}")
        path.rename(hidden)
        sync_folder(self.folder)  # that it is gone comes before that its files are
        shutil.rmtree(hidden, ignore_errors=True)

    def set_aside(self, after: int) -> Sequence[CheckpointFolder]:
        """Rename the checkpoints after a step, newest first, so that what is left is a whole history at any moment."""
        taken = []
        for step, path in sorted(self.names(), reverse=True):
            if step > after:
                target = path.with_name(f"{_ASIDE}{step:08d}-{secrets.token_hex(4)}")
                path.rename(target)
                taken.append(CheckpointFolder(step, target, None))
        sync_folder(self.folder)
        return taken

    def path_of(self, step: int) -> Path:
        return self.folder / folder_name(step)

    def refuse_if_superseded(self) -> None:
        if self.generation and not (self.folder / self.generation).is_dir():
            raise self._superseded()

    def _unfinished(self, step: int) -> Path:
        assert self.generation, "a generation is opened or joined before anything is written"
        return self.folder / self.generation / folder_name(step)


def is_checkpoint(path: Location) -> bool:
    """Whether ``path`` is a checkpoint folder, by its manifest or by its name (a damaged one has no manifest)."""
    return (NAME.fullmatch(path.name) is not None and path.is_dir()) or exists(path / MANIFEST)


def add_file(folder: Location, name: str, content: bytes) -> FileEntry:
    """Write a small file beside the rank files, synced; its entry for the manifest. Raises OSError."""
    write_file(folder / name, content)
    return FileEntry(file=name, bytes=len(content), checksum=xxhash.xxh3_128(content).hexdigest())


def read_small_file(folder: Location, entry: FileEntry) -> bytes:
    """The content of a file that holds no shards, as its checksum says. Raises CheckpointError naming it."""
    path = folder / entry.file
    try:
        with store_errors(path):
            size = path.stat().st_size
            if size != entry.bytes:
                raise CheckpointError(f"{path}: it has {size:,} bytes instead of {entry.bytes:,}.")
            if size > _MAX_SMALL_BYTES:
                raise CheckpointError(f"{path}: {size:,} bytes are too many for a file beside the rank files.")
            content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: it is missing.") from None
    if xxhash.xxh3_128(content).hexdigest() != entry.checksum:
        raise CheckpointError(f"{path}: its bytes are not what was written.")
    return content


def find_problem(path: Location) -> str | None:
    """Why a checkpoint cannot be used, by its manifest and the sizes of its files; None if it looks whole.

    Raises Unreachable where that cannot be found out.
    """
    problem, _ = _look(path)
    return problem


def _look(path: Location) -> tuple[str | None, Manifest | None]:
    """The same, and the manifest, where it can be read."""
    try:
        sizes, manifest = list_folder(path), read_manifest(path)
    except FileNotFoundError:
        return f"{path} is not there.", None
    except Unreachable:
        raise
    except CheckpointError as error:
        return str(error), None
    for entry in manifest.files:
        size = sizes.get(entry.file)
        if size is None:
            return f"{path / entry.file} is missing.", manifest
        if size != entry.bytes:
            return f"{path / entry.file} has {size:,} bytes instead of {entry.bytes:,}.", manifest
    return None, manifest


def _readable(path: Location) -> Manifest | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def best_of(manifests: Mapping[Location, Manifest], count: int) -> set[Location]:
    """The ``count`` checkpoints with the lowest validation loss."""
    losses = [(m.validation_loss, str(path), path) for path, m in manifests.items() if m.validation_loss is not None]
    return {path for _, _, path in sorted(losses, key=lambda entry: entry[:2])[:count]}

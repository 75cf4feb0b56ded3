"""Checkpoints in an object store, where nothing can be renamed: what exists is decided by conditional puts.

Layout below the store's URL, ``g00004-1a2b3c4d`` being a generation:

    generations/00004.json                      what the run had when its fourth start began, and what was set aside
    step-00000160.g00004-1a2b3c4d/manifest.json put last: the checkpoint appears

A checkpoint exists if its manifest is there, and it is of the newest generation or listed by it. A start lists what it
finds and puts the record of its generation, if none of that number exists; so what an earlier start commits after
that is listed nowhere, and does not exist for any reader. What was set aside stays where it is, and every later record
lists it as that, for as long as it is there: it is no checkpoint of the run any more, and no start removes it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import orjson
from upath import UPath

from megatrain.checkpoint.location import Location, exists, list_folder, store_errors, write_if_absent
from megatrain.checkpoint.manifest import MANIFEST, NAME, Manifest, folder_name
from megatrain.checkpoint.store import CheckpointFolder, CheckpointStore
from megatrain.distributed.activity import Activity
from megatrain.errors import CheckpointError

_TRIES = 20


@dataclass(frozen=True)
class _Generation:
    """The record of one start. ``before``: the checkpoints that the run had, by folder name; ``aside``: what had been
    taken out of it."""

    number: int
    token: str
    before: frozenset[str]
    aside: frozenset[str]

    @property
    def name(self) -> str:
        return f"g{self.number:05d}-{self.token}"


_NONE = _Generation(0, "", frozenset(), frozenset())


class ObjectStore(CheckpointStore):
    """Checkpoints below a URL of an object store that fsspec serves and that knows conditional puts."""

    def __init__(self, url: UPath) -> None:
        self.folder: UPath = url
        self.activity = Activity()

    def names(self) -> Iterator[tuple[int, UPath]]:
        newest = self._newest()
        for name in self._children():
            match = NAME.fullmatch(name)
            self.activity.transfer()
            if match and self._is_of(newest, name) and exists(self.folder / name / MANIFEST):
                yield int(match[1]), self.folder / name

    def open_generation(self) -> str:
        self.generation = self._put_generation(self._existing).name
        kept = {path.name for _, path in self.names()} | self._newest().aside
        for name in self._children():
            if NAME.fullmatch(name) and name not in kept:
                self._delete(name)
        return self.generation

    def begin(self, step: int) -> UPath:
        return self.path_of(step)  # a prefix: there is nothing to make

    def commit(self, manifest: Manifest) -> UPath:
        folder = self.path_of(manifest.step)
        self.refuse_if_superseded()
        try:
            write_if_absent(folder / MANIFEST, manifest.encode())
        except FileExistsError:
            raise CheckpointError(f"{folder} has a manifest already; a checkpoint is never overwritten.") from None
        self.refuse_if_superseded(unless_listed=folder.name)
        return folder

    def abandon(self, step: int) -> None:
        self._delete(self.path_of(step).name)

    def remove(self, path: Location) -> None:
        self._delete(path.name)

    def set_aside(self, after: int) -> Sequence[CheckpointFolder]:
        """Open a generation that lists the checkpoints after a step as set aside. Their objects stay where they are."""
        found = list(self.names())
        taken = [CheckpointFolder(step, path, None) for step, path in found if step > after]
        if taken:
            left = [path.name for step, path in found if step <= after]
            generation = self._put_generation(lambda: left, [each.path.name for each in taken])
            if self.generation:
                self.generation = generation.name
        return sorted(taken, key=lambda checkpoint: checkpoint.step, reverse=True)

    def path_of(self, step: int) -> UPath:
        assert self.generation, "a generation is opened or joined before anything is written"
        return self.folder / f"{folder_name(step)}.{self.generation}"

    def refuse_if_superseded(self, unless_listed: str | None = None) -> None:
        """Raise Superseded if a later start has put its generation (and does not list this checkpoint)."""
        newest = self._newest()
        if self.generation and newest.name != self.generation and unless_listed not in newest.before:
            raise self._superseded()

    def _put_generation(self, before: Callable[[], Iterable[str]], taken: Sequence[str] = ()) -> _Generation:
        """Put the next generation's record; ``taken``: what it sets aside. Two starts at one time: one of them gets the
        number, the other the next."""
        for _ in range(_TRIES):
            listed, newest = sorted(before()), self._newest()
            aside = newest.aside.intersection(self._children()).union(taken)
            generation = _Generation(newest.number + 1, secrets.token_hex(4), frozenset(listed), aside)
            record = {"token": generation.token, "before": listed, "aside": sorted(aside)}
            try:
                write_if_absent(self._record(generation.number), orjson.dumps(record))
                return generation
            except FileExistsError:
                continue
        raise CheckpointError(f"{self.folder}: other starts of this run keep taking it over; is it started in a loop?")

    def _existing(self) -> Iterator[str]:
        return (path.name for _, path in self.names())

    def _newest(self) -> _Generation:
        numbers = [int(name[:-5]) for name in self._children("generations") if name[:-5].isdigit()]
        if not numbers:
            return _NONE
        path = self._record(max(numbers))
        try:
            with store_errors(path):
                record = orjson.loads(path.read_bytes())
            aside = frozenset(record.get("aside", ()))  # older versions kept no such list
            return _Generation(max(numbers), record["token"], frozenset(record["before"]), aside)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not the record of a start ({error!r}).") from None

    def _is_of(self, newest: _Generation, name: str) -> bool:
        return name in newest.before or name.endswith(f".{newest.name}") or newest is _NONE

    def _record(self, number: int) -> UPath:
        return self.folder / "generations" / f"{number:05d}.json"

    def _children(self, below: str = "") -> Iterable[str]:
        """Names below the store's URL."""
        try:
            return list_folder(self.folder / below if below else self.folder)
        except FileNotFoundError:
            return ()

    def _delete(self, name: str) -> None:
        """The manifest first: a checkpoint is whole or does not exist."""
        fs, folder = self.folder.fs, self.folder / name
        for path in (folder / MANIFEST, folder):
            self.activity.transfer()
            with contextlib.suppress(FileNotFoundError), store_errors(path):
                fs.rm(path.path, recursive=True)

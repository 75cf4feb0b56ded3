"""One rank's part in saving: copy in memory, write in the background, and agree with the others before it counts.

All ranks go through the same states at the same steps: idle, writing (until every rank has written or failed),
committing (rank 0 lets the checkpoint appear), idle. Each change follows from statuses that were summed over all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from megatrain.checkpoint.arena import Arena, Place
from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import FileEntry, Manifest
from megatrain.checkpoint.rank_file import rank_file_name, read_written, write_rank_file
from megatrain.checkpoint.store import CheckpointStore, Retention, add_file
from megatrain.distributed.activity import Activity
from megatrain.distributed.fragment import FlatShard, Fragment
from megatrain.errors import CheckpointError, NotFinite, Superseded

logger = logging.getLogger(__name__)

T = TypeVar("T")
_READERS = 16  # of the ranks' files, as a checkpoint is committed


class SaveStatus(NamedTuple):
    """How far a rank is with the current save, or the sums of that over all ranks."""

    written: float = 0.0
    failed: float = 0.0
    committed: float = 0.0


@dataclass(frozen=True)
class SaveResult:
    """How a save ended. ``path``: where the checkpoint is, None if it failed. ``stall_seconds``: training stood still
    for the copy; ``seconds``: from the copy to the commit."""

    step: int
    path: Location | None
    stall_seconds: float
    seconds: float


class CheckpointSaver:
    """Saves this rank's fragments into ``rank-00000.safetensors`` of a checkpoint. ``activity``: told of each block."""

    def __init__(
        self,
        store: CheckpointStore,
        rank: int,
        world_size: int,
        retention: Retention,
        activity: Activity | None = None,
    ) -> None:
        self._store, self._rank, self._world_size, self._retention = store, rank, world_size, retention
        self._activity = activity or Activity()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._state: Literal["idle", "writing", "committing"] = "idle"
        self._future: Future[Any] | None = None
        self._arena = Arena()
        self._preparation: Future[None] | None = None
        self._manifest: Callable[[Sequence[FileEntry]], Manifest] | None = None
        self._files: tuple[tuple[str, bytes], ...] = ()
        self._step, self._began, self._stall = 0, 0.0, 0.0
        self._is_prune_due = False
        self.error: CheckpointError | None = None
        """Why this rank's part of the last save failed; None where it did not."""

    @property
    def is_saving(self) -> bool:
        """The same on all ranks."""
        return self._state != "idle"

    def prepare(self, fragments: Iterable[Fragment]) -> None:
        """Make the memory that copies of ``fragments`` will go to, in the background."""
        places, is_on_gpu = [], False
        for fragment in fragments:
            places.append(Place(_key(fragment), fragment.data.shape, fragment.data.dtype))
            is_on_gpu = is_on_gpu or fragment.data.is_cuda
        self._preparation = self._thread.submit(self._arena.reserve, places, pin=is_on_gpu)

    def begin(
        self,
        step: int,
        fragments: Iterable[Fragment],
        manifest: Callable[[Sequence[FileEntry]], Manifest],
        files: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Copy the fragments in memory and start to write. ``manifest`` and the small ``files`` are rank 0's part.

        Where ``fragments`` raises CheckpointError, this rank's part has failed.
        """
        assert not self.is_saving
        self._began = time.perf_counter()
        if self._preparation is not None:
            self._preparation.result()
        copied: Future[list[Fragment]] = Future()
        try:
            copies = [f._replace(data=self._arena.copy(_key(f), f.data)) for f in fragments]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.current_stream().synchronize()  # one wait for all copies
            copied.set_result(copies)
            self._activity.begin_transfer(sum(copy.data.nbytes for copy in copies))
        except CheckpointError as error:
            copied.set_exception(error)
        self._stall = time.perf_counter() - self._began
        self._step, self._manifest, self._files = step, manifest, tuple(files)
        self._state, self.error = "writing", None
        self._future = self._thread.submit(self._write, copied)

    @property
    def pending(self) -> Future[Any] | None:
        """This rank's part of what the ranks do now; None where it has none."""
        return self._future

    def status(self, wait: bool = False) -> SaveStatus:
        """This rank's status now; with ``wait``, once its part is done."""
        if self._future is None or not (wait or self._future.done()):
            return SaveStatus()
        error = self._future.exception()
        if error is not None:
            if isinstance(error, Superseded) or not isinstance(error, CheckpointError):
                raise error
            self.error = error
            return SaveStatus(failed=1.0)
        return SaveStatus(written=1.0) if self._state == "writing" else SaveStatus(committed=1.0)

    def advance(self, total: SaveStatus) -> SaveResult | None:
        """Go on by the sum of all ranks' statuses; how the save ended, once it has."""
        if self._state == "writing" and total.written + total.failed == self._world_size:
            if total.failed:
                return self._end(None)
            self._state = "committing"
            self._future = self._thread.submit(self._commit) if self._rank == 0 else None
        elif self._state == "committing" and total.failed:
            return self._end(None)
        elif self._state == "committing" and total.committed:
            return self._end(self._store.path_of(self._step))
        return None

    def prune(self) -> None:
        """Remove the checkpoints that are not kept, in the background, if one has appeared since this was last done."""
        if self._is_prune_due:
            self._is_prune_due = False
            self._thread.submit(self._clean_up, self._store.prune, self._retention)

    def close(self, *, prune: bool = True) -> None:
        """Stop the thread, once it has written what it is writing, and removed what is not kept."""
        if prune:
            self.prune()
        self._thread.shutdown(wait=True)
        self._arena.close()

    def _end(self, path: Location | None) -> SaveResult:
        self._state, self._future = "idle", None
        if path is None and self._rank == 0:
            self._thread.submit(self._clean_up, self._store.abandon, self._step)
        return SaveResult(self._step, path, self._stall, time.perf_counter() - self._began)

    def _write(self, copied: Future[list[Fragment]]) -> None:
        fragments = copied.result()
        for fragment in fragments:
            _refuse_non_finite(fragment)
        path = self._begin_folder() / rank_file_name(self._rank)
        with self._naming(path):
            write_rank_file(path, fragments, self._activity)

    def _commit(self) -> None:
        assert self._manifest is not None
        folder = self._begin_folder()
        with self._naming(folder), ThreadPoolExecutor(_READERS) as readers:
            paths = [folder / rank_file_name(rank) for rank in range(self._world_size)]
            entries = []
            for entry in readers.map(read_written, paths):
                entries.append(entry)
                self._activity.transfer()
            for name, content in self._files:
                entries.append(add_file(folder, name, content))
                self._activity.transfer()
            self._store.commit(self._manifest(entries))
        self._is_prune_due = True

    def _begin_folder(self) -> Location:
        with self._naming(self._store.folder):
            return self._store.begin(self._step)

    def _clean_up(self, action: Callable[[T], None], what: T) -> None:
        """Remove what is of no more use; the run goes on whether that succeeds or not."""
        try:
            action(what)
        except (OSError, CheckpointError) as error:
            logger.warning("checkpoints that are not kept cannot be removed: %s", error)

    @contextmanager
    def _naming(self, path: Location) -> Iterator[None]:
        """Turn an OSError into a CheckpointError that names its file, or ``path`` where it knows none (a write).

        Raises Superseded where that is the cause.
        """
        try:
            yield
        except OSError as error:
            self._store.refuse_if_superseded()
            raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error


def _refuse_non_finite(fragment: Fragment) -> None:
    """Raise NotFinite, naming the parameter. A single pass: the least and the greatest of NaN are NaN."""
    if fragment.data.numel() and not torch.stack(torch.aminmax(fragment.data)).isfinite().all():
        raise NotFinite(f"{fragment.shard.name} ({fragment.kind}) has NaN or infinity in it")


def _key(fragment: Fragment) -> tuple[FlatShard, str]:
    return fragment.shard, fragment.kind

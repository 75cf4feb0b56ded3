"""A file that only grows by whole records, and whose failures never stop a run."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 4 << 20


class AppendFile:
    """Appends records to ``path``, each whole or not at all, without ever raising for a failed write.

    What cannot be written (a full disk, a read-only folder) is held back, up to ``max_pending_bytes`` (then the oldest
    is given up), and tried again with the next record. The first failure is logged as a warning, so is the recovery.

    ``prepare`` is called once before the first write, and again until it succeeds without an ``OSError``.
    """

    def __init__(
        self,
        path: Path,
        prepare: Callable[[], None] | None = None,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self.path = path
        self._prepare = prepare
        self._max_pending_bytes = max_pending_bytes
        self._pending: list[bytes] = []
        self._num_lost = 0
        self._descriptor: int | None = None
        self._failing = False
        self.flush()

    def append(self, record: bytes) -> None:
        """Write ``record`` behind all that was held back, in one call to the operating system."""
        self._pending.append(record)
        self.flush()

    def flush(self) -> None:
        """Try to open the file and to write what was held back, if anything was."""
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            if self._pending:
                _write_whole(self._descriptor, b"".join(self._pending))
        except OSError as error:
            self._fail(error)
        else:
            self._pending.clear()
            self._recover()

    def close(self) -> None:
        """Try once more to write what was held back, then close the file."""
        if self._pending:
            self.flush()
        self._release()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def _fail(self, error: OSError) -> None:
        self._release()  # a handle that failed once (a lost network mount) may never work again
        while len(self._pending) > 1 and sum(map(len, self._pending)) > self._max_pending_bytes:
            self._pending.pop(0)
            self._num_lost += 1
        if not self._failing:
            self._failing = True  # set first: the warning may come back here through a log file on the same disk
            reason = error.strerror or str(error)
            logger.warning("cannot write %s: %s. Training goes on; writing is tried again later.", self.path, reason)

    def _recover(self) -> None:
        if self._failing:
            self._failing = False
            num_lost, self._num_lost = self._num_lost, 0
            logger.warning("%s can be written again; %d records were lost meanwhile.", self.path, num_lost)

    def _release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.close(descriptor)
            except OSError as error:  # network file systems report late write errors here
                logger.debug("closing %s: %s", self.path, error)


def _write_whole(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` or, where the disk takes only a part of it, none; raises ``OSError`` then."""
    num_written = os.write(descriptor, data)
    if num_written < len(data):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - num_written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

"""Who has died: as long as a rank lives it holds a connection to rank 0, and all end when one of them breaks.

Nothing is said on it in between. The kernels at both ends ask each other for a sign of life, and answer for a process
that is stopped, starved or busy: only a death ends it, or a node or a network that has failed. So no rank is taken for
dead because it is slow, and one that stands still is left to the watchdog. Rank 0 hears of a death once, and tells all.

The connections are there from a rank's first second, before torch is imported: what waits for a rank that died as it
started would wait for long. Rank 0 leaves in RUN/logs where it listens.
"""

from __future__ import annotations

import contextlib
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import orjson

from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.causes import is_lost_peer
from megatrain.distributed.naming import name_ranks
from megatrain.errors import Preempted

_SILENT_SECONDS = 20  # without an answer from the other kernel: its node or the network has failed
_ASK_SECONDS = 5
_LOOK_SECONDS, _LOOK_LATER_SECONDS = 0.25, 5.0
_GATHER_SECONDS = 1.0  # others may have died with it
_RENEW_SECONDS = (
    5.0  # before all were there: what was found may have been rank 0 of an earlier start, in its last moment
)
_FAILED_SECONDS = 10.0  # a rank that ends with an error of its own has told it; the others have it too, or soon notice
_COME_SECONDS = 10.0  # for those not there yet, once a rank was told to end
_FILE = "liveness"
_KILLED = "killed, or crashed (the log may say why)"
_START_AGAIN = "Start the run again: it goes on from the newest checkpoint."


class _Gone(NamedTuple):
    """A rank that has ended, how, and when that is to be told (by the monotonic clock)."""

    rank: int
    host: str
    how: str
    tell_at: float


class _Line:
    """One connection, which carries short lines. ``rank``, ``host``: at its other end, once that has said so."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank, self.host = -1, ""
        self.how_it_ended: str | None = None
        self._heard = b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {
            "TCP_KEEPIDLE": _ASK_SECONDS,
            "TCP_KEEPALIVE": _ASK_SECONDS,  # macOS's name for it
            "TCP_KEEPINTVL": _ASK_SECONDS,
            "TCP_KEEPCNT": _SILENT_SECONDS // _ASK_SECONDS - 1,
            "TCP_USER_TIMEOUT": 1000 * _SILENT_SECONDS,
        }
        for name, value in limits.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def say(self, *words: str) -> None:
        """Send a line; to one that has gone, nothing."""
        with contextlib.suppress(OSError):
            self.connection.send(" ".join(words).encode() + b"\n")

    def hear(self) -> Iterator[tuple[str, str]]:
        """The lines that have come, each as its first word and the rest. Afterwards it may be known how it ended."""
        try:
            came = self.connection.recv(1 << 16)
            self.how_it_ended = None if came else _KILLED
        except BlockingIOError:
            return
        except ConnectionResetError:
            came, self.how_it_ended = b"", _KILLED
        except OSError as error:
            came = b""
            self.how_it_ended = f"no answer any more ({error.strerror}): the node or its network has failed"
        *lines, self._heard = (self._heard + came).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            yield word, rest


class LivenessMonitor:
    """Held by every rank from its beginning to its end, by `with`. Where others end well, or with an error that they
    have told themselves, it says so to them.

    ``on_death``: gets the report once a rank has died, in a thread of its own, and has to end this one.
    ``is_told_to_end``: whether a launcher, or somebody, wants this rank to end.
    """

    def __init__(
        self,
        rank: RankInfo,
        run_dir: Path,
        start: str,
        on_death: Callable[[str], None],
        is_told_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rank, self._on_death, self._is_told_to_end = rank, on_death, is_told_to_end
        self._path = run_dir / "logs" / f"{_FILE}-{start}.json"
        self._lines: list[_Line] = []
        self._gone: list[_Gone] = []
        self._num_there = 1
        self._have_met = False
        self._told_at: float | None = None
        self._address: tuple[str, int] | None = None
        self._token = secrets.token_hex(8)  # rank 0's: who does not know it is a stranger
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._ended = threading.Event()
        woken, self._waker = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def __enter__(self) -> LivenessMonitor:
        if self._rank.world_size > 1:
            if self._rank.rank == 0:
                self._listen()
            self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self._thread.ident is not None:
            if error is not None and is_lost_peer(error):
                self._thread.join(_FAILED_SECONDS / 2)  # rather than that somebody is lost, it can tell who
            self._ended.set()
            self._waker.send(b".")
            self._thread.join()
        self._say_to_all("bye" if error is None or isinstance(error, Preempted) else "failed")
        for line in self._lines:
            line.connection.close()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._waker.close()

    def met(self) -> None:
        """From here on no rank is missing: the ranks have met elsewhere."""
        self._have_met = True

    def _listen(self) -> None:
        """On any port; the file that says which one appears as a whole, in place of those of earlier starts."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        size = self._rank.world_size
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + size, hard), hard))
        self._listener = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=dual)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # a full disk: the run goes on without
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._path.parent.glob(f"{_FILE}-*"):
                path.unlink(missing_ok=True)
            aside = self._path.with_suffix(".tmp")
            aside.write_bytes(orjson.dumps([self._listener.getsockname()[1], self._token]))
            aside.replace(self._path)

    def _watch(self) -> None:
        soon = time.monotonic() + 1.0
        while self._rank.rank != 0 and not self._lines and time.monotonic() < soon:
            self._join()  # before torch is imported, if possible: that lets no other thread run for long
            self._ended.wait(0.02)
        while not self._ended.is_set():
            if self._rank.rank != 0 and not self._lines:
                self._join()
            waiting = self._num_there < self._rank.world_size and not self._have_met
            looking = self._gone or waiting or not self._lines
            for key, _ in self._selector.select(_LOOK_SECONDS if looking else _LOOK_LATER_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Line) and self._hear(key.data):
                    return
            if (report := self._report()) is not None:
                self._say_to_all("death", report)
                self._on_death(report)
                return

    def _join(self) -> None:
        """Look for rank 0, and connect to it; to another than was lost, if it was."""
        try:
            port, token = orjson.loads(self._path.read_bytes())
            address = (self._rank.master_addr, port)
            if address == self._address:
                return
            connection = socket.create_connection(address, timeout=_LOOK_LATER_SECONDS)
        except (OSError, orjson.JSONDecodeError, TypeError, ValueError):
            return
        self._address, self._token, self._gone = address, token, []
        line = self._hold(connection)
        self._greet(line)
        line.rank, line.host = 0, self._rank.master_addr  # it may die before it says so

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            self._hold(self._listener.accept()[0])
        except OSError:  # too many open files, perhaps: it comes again
            time.sleep(_LOOK_SECONDS)

    def _hold(self, connection: socket.socket) -> _Line:
        line = _Line(connection)
        self._lines.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)
        return line

    def _greet(self, line: _Line) -> None:
        line.say("hello", self._token, str(self._rank.rank), socket.gethostname())

    def _hear(self, line: _Line) -> bool:
        """Take in what a line says; whether it said that a rank has died."""
        for word, rest in line.hear():
            if word == "hello":
                self._welcome(line, *rest.split(" "))
            elif line.rank < 0:
                self._drop(line)
            elif word == "all":
                self._num_there = self._rank.world_size
            elif word == "bye":
                self._drop(line)
            elif word == "failed":
                self._drop(line, "ended with an error of its own", _FAILED_SECONDS)
            elif word == "death":
                self._on_death(rest)
                return True
        if line.how_it_ended is not None:
            is_early = self._rank.rank != 0 and self._num_there < self._rank.world_size
            self._drop(line, line.how_it_ended, _RENEW_SECONDS if is_early else _GATHER_SECONDS)
        return False

    def _welcome(self, line: _Line, token: str, rank: str = "", host: str = "") -> None:
        """Note who is at the other end. On rank 0: when all are there, all hear of it."""
        if token != self._token:
            self._drop(line)
            return
        line.rank, line.host = int(rank), host
        if self._rank.rank == 0:
            self._greet(line)
            self._num_there += 1
            if self._num_there == self._rank.world_size:
                self._say_to_all("all")

    def _say_to_all(self, *words: str) -> None:
        for line in self._lines:
            if line.rank >= 0:
                line.say(*words)

    def _drop(self, line: _Line, how: str = "", tell_after_seconds: float = 0.0) -> None:
        """A line has ended; where ``how`` says so, as one that must not."""
        if line not in self._lines:
            return
        self._lines.remove(line)
        self._selector.unregister(line.connection)
        line.connection.close()
        if how and line.rank >= 0:  # else a stranger
            self._gone.append(_Gone(line.rank, line.host, how, time.monotonic() + tell_after_seconds))

    def _report(self) -> str | None:
        """Who has died, once that is to be told."""
        now = time.monotonic()
        if self._gone and now >= min(gone.tell_at for gone in self._gone):
            how = min(self._gone, key=lambda gone: gone.tell_at).how
            names = name_ranks((gone.rank, gone.host) for gone in sorted(self._gone) if gone.how == how)
            return f"{names[0].upper()}{names[1:]}: {how}. The others have ended with it. {_START_AGAIN}"
        if self._have_met or self._num_there == self._rank.world_size or not self._is_told_to_end():
            return None
        self._told_at = self._told_at or now
        if now < self._told_at + _COME_SECONDS:
            return None
        return (
            f"Rank {self._rank.rank} on {socket.gethostname()} was told to end while the ranks were starting, and not "
            "all of them were there: perhaps one died. Start the run again."
        )

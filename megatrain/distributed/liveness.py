"""Who has died, and who is stuck: each rank holds a connection to rank 0 as long as it lives, and all end together.

In between nothing is sent on it. The kernels at both ends probe each other, and answer for a process that is stopped,
starved or busy: only a death ends it, or a node or a network that has failed. So no rank is presumed dead because it is
slow. Rank 0 sees a death once, and tells all.

A rank that gets nothing done for ``train.hang_timeout_seconds`` tells rank 0, which asks all where they stand. All dump
the stacks of their threads into their logs and answer, but for those that are stopped: by that the one that is stuck is
known. The time in which the rank itself was suspended (`scontrol suspend`, SIGSTOP) does not count.

The connections are there from a rank's first second, before torch is imported: what waits for a rank that died as it
started would wait for long. Rank 0 leaves in RUN/logs where it listens.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import orjson

from megatrain.atomic import commit_bytes
from megatrain.distributed.activity import Activity, Position, find_stuck
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.causes import is_lost_peer
from megatrain.distributed.naming import name_ranks
from megatrain.distributed.peer import Peer
from megatrain.errors import Preempted

_POLL_SECONDS, _FIRST_POLL_SECONDS, _CONNECT_SECONDS = 0.25, 0.02, 5.0
_SUSPENDED_SECONDS = 1.0  # between two looks of this process: it was suspended
_GATHER_SECONDS = 1.0  # others may have died with it
_RENEW_SECONDS = 5.0  # before all have joined: what was found may have been rank 0 of an earlier start, as it ended
_FAILED_SECONDS = 10.0  # a rank that ends with an error of its own has told it; the others have it too, or soon notice
_JOIN_SECONDS = 10.0  # for those that have not joined yet, once a rank has to end
_ANSWER_SECONDS = 10.0  # to say where a rank stands
_FILE = "liveness"
_START_AGAIN = "Start the run again: it goes on from the newest checkpoint"


class _Death(NamedTuple):
    """A rank that has ended, how, and when to report it (by the monotonic clock)."""

    rank: int
    host: str
    how: str
    report_at: float


def has_everyone_joined(run_dir: Path, start: str) -> bool:
    """Whether all ranks of a start have joined rank 0, so that they miss each other by themselves."""
    try:
        return bool(orjson.loads(_path(run_dir, start).read_bytes())["all_joined"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return False


class LivenessMonitor:
    """Held by every rank from its beginning to its end, by `with`. A rank that ends well, or with an error that it has
    told itself, says so to the others.

    ``end_rank``: gets the report once a rank has died or is stuck, in a thread of its own, and has to end this one.
    ``must_end``: whether a launcher, or somebody, wants this rank to end.
    """

    def __init__(
        self,
        rank: RankInfo,
        run_dir: Path,
        start: str,
        end_rank: Callable[[str], None],
        must_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self._rank, self._end_rank, self._must_end = rank, end_rank, must_end
        self._path = _path(run_dir, start)
        self._peers: list[Peer] = []
        self._deaths: list[_Death] = []
        self._num_joined = 1
        self._must_end_since: float | None = None
        self._report: str | None = None
        self._address: tuple[str, int] | None = None
        self._token = secrets.token_hex(8)  # rank 0's: who does not know it is a stranger
        self._activity, self._log, self._hang_timeout = Activity(), Path(), math.inf
        self._progress, self._moved_at = self._activity.progress, time.monotonic()
        self._looked_at = self._moved_at
        self._stuck_at: float | None = None
        self._positions: dict[int, Position] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="liveness", daemon=True)

    def __enter__(self) -> LivenessMonitor:
        if self._rank.rank == 0 and self._rank.world_size > 1:
            self._listen()
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and is_lost_peer(error):
            self._thread.join(_FAILED_SECONDS / 2)  # rather than that somebody is lost, it can tell who
        self._closed.set()
        self._thread.join()
        self._send_all("bye" if error is None or isinstance(error, Preempted) else "failed")
        for peer in self._peers:
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._selector.close()

    def watch(self, activity: Activity, timeout_seconds: float, log: Path) -> None:
        """From here on all ranks are there, and none gets nothing done for so long; ``log``: for the stacks."""
        self._num_joined = self._rank.world_size
        self._activity, self._log, self._moved_at = activity, log, time.monotonic()
        self._hang_timeout = timeout_seconds
        if self._listener is not None:
            self._publish_address()

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
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path in self._path.parent.glob(f"{_FILE}-*"):
                path.unlink(missing_ok=True)
        self._publish_address()

    def _publish_address(self) -> None:
        assert self._listener is not None
        record = {"port": self._listener.getsockname()[1], "token": self._token, "all_joined": self._have_all_joined}
        with contextlib.suppress(OSError):  # a full disk: the run goes on without
            commit_bytes(self._path, orjson.dumps(record), durable=False)

    @property
    def _have_all_joined(self) -> bool:
        return self._num_joined == self._rank.world_size

    def _monitor(self) -> None:
        soon = time.monotonic() + 1.0
        while not self._closed.is_set():
            if self._rank.rank != 0 and not self._peers:
                self._connect()
            # At first often: before torch is imported, if possible, which lets no other thread run for long.
            is_early = not self._peers and time.monotonic() < soon
            events = self._selector.select(_FIRST_POLL_SECONDS if is_early else _POLL_SECONDS)
            for key, _ in events:
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, Peer):
                    self._receive(key.data)
            self._look_for_progress()
            report = self._report or self._death_report() or self._hang_report()
            if not events:  # not for each of the ranks that join: it may look into RUN/logs
                report = report or self._start_report()
            if report is not None:
                self._send_all("end", report)
                self._end_rank(report)
                return

    def _connect(self) -> None:
        """Look for rank 0, and connect to it; to another than was lost, if it was."""
        try:
            record = orjson.loads(self._path.read_bytes())
            address = (self._rank.master_addr, record["port"])
            if address == self._address:
                return
            connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
            return
        self._address, self._token, self._deaths = address, record["token"], []
        peer = self._add(connection)
        self._greet(peer)
        peer.rank, peer.host = 0, self._rank.master_addr  # it may die before it says so

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            self._add(self._listener.accept()[0])
        except OSError:  # too many open files, perhaps: it comes again
            time.sleep(_POLL_SECONDS)

    def _add(self, connection: socket.socket) -> Peer:
        peer = Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _greet(self, peer: Peer) -> None:
        peer.send("hello", self._token, str(self._rank.rank), socket.gethostname())

    def _receive(self, peer: Peer) -> None:
        for word, rest in peer.receive():
            if word == "hello":
                self._welcome(peer, *rest.split(" "))
            elif peer.rank < 0:
                self._drop(peer)
            elif word == "joined":
                self._num_joined = self._rank.world_size
            elif word == "bye":
                self._drop(peer)
            elif word == "failed":
                self._drop(peer, "ended with an error of its own", _FAILED_SECONDS)
            elif word == "stuck":
                self._note_stuck()
            elif word == "where":
                self._dump_stacks()
                peer.send("at", orjson.dumps(tuple(self._position())).decode())
            elif word == "at":
                self._positions[peer.rank] = Position(*orjson.loads(rest))
            elif word == "end":
                self._report = self._report or rest
        if peer.how_it_ended is not None:
            is_early = self._rank.rank != 0 and not self._have_all_joined
            self._drop(peer, peer.how_it_ended, _RENEW_SECONDS if is_early else _GATHER_SECONDS)

    def _welcome(self, peer: Peer, token: str, rank: str = "", host: str = "") -> None:
        """Note who is at the other end. On rank 0: when all have joined, all hear of it."""
        if token != self._token:
            self._drop(peer)
            return
        peer.rank, peer.host = int(rank), host
        if self._rank.rank == 0:
            self._greet(peer)
            self._num_joined += 1
            if self._have_all_joined:
                self._publish_address()
                self._send_all("joined")

    def _send_all(self, *words: str) -> None:
        for peer in self._peers:
            if peer.rank >= 0:
                peer.send(*words)

    def _drop(self, peer: Peer, how: str = "", report_after_seconds: float = 0.0) -> None:
        """A connection has ended; where ``how`` says so, as one that must not."""
        if peer not in self._peers:
            return
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if how and peer.rank >= 0:  # else a stranger
            self._deaths.append(_Death(peer.rank, peer.host, how, time.monotonic() + report_after_seconds))

    def _death_report(self) -> str | None:
        if not self._deaths or time.monotonic() < min(death.report_at for death in self._deaths):
            return None
        how = min(self._deaths, key=lambda death: death.report_at).how
        names = name_ranks((death.rank, death.host) for death in sorted(self._deaths) if death.how == how)
        return f"{names[0].upper()}{names[1:]}: {how}. The others have ended with it. {_START_AGAIN}."

    def _start_report(self) -> str | None:
        """That this rank has to end, and ranks are missing that might have told that they end too."""
        if self._have_all_joined or not self._must_end():
            return None
        self._must_end_since = self._must_end_since or time.monotonic()
        if time.monotonic() < self._must_end_since + _JOIN_SECONDS:
            return None
        return (
            f"Rank {self._rank.rank} on {socket.gethostname()} was told to end while the ranks were starting, and not "
            "all of them were there: perhaps one died. Start the run again."
        )

    def _look_for_progress(self) -> None:
        now, before, self._progress = time.monotonic(), self._progress, self._activity.progress
        suspended, self._looked_at = now - self._looked_at, now
        if self._progress != before:
            self._moved_at = now
        elif suspended > _SUSPENDED_SECONDS:
            self._moved_at += suspended
        if now > self._moved_at + self._hang_timeout + self._activity.patience_seconds:
            self._note_stuck()

    def _note_stuck(self) -> None:
        """This rank, or one that has told rank 0, gets nothing done."""
        if self._stuck_at is None:
            self._stuck_at = time.monotonic()
            self._dump_stacks()
            self._positions[self._rank.rank] = self._position()
            self._send_all("where" if self._rank.rank == 0 else "stuck")

    def _hang_report(self) -> str | None:
        """Who is stuck, once all have answered rank 0, or had the time to."""
        if self._stuck_at is None:
            return None
        is_first = self._rank.rank == 0
        silent = [(peer.rank, peer.host) for peer in self._peers if peer.rank not in self._positions]
        patience = _ANSWER_SECONDS if is_first else 1.5 * _ANSWER_SECONDS
        if (silent or not is_first) and time.monotonic() < self._stuck_at + patience:
            return None
        stuck = "the others wait for rank 0, which does not answer,"
        if is_first:
            stuck = find_stuck([self._positions[rank] for rank in sorted(self._positions)], sorted(silent))
        return (
            f"Nothing has moved for {self._hang_timeout:.0f} s (train.hang_timeout_seconds): {stuck} at step "
            f"{self._activity.step_shown}. The stacks of each rank that could write them are in {self._log.parent}. "
            f"{_START_AGAIN}; leave that node out if it happens there again."
        )

    def _position(self) -> Position:
        activity = self._activity
        here = (self._rank.rank, socket.gethostname(), activity.step, activity.part)
        return Position(*here, activity.transferred_bytes, activity.total_bytes)

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError), self._log.open("a") as file:  # a full disk must not hide the hang
            file.write("nothing has moved; the stacks of all threads:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _path(run_dir: Path, start: str) -> Path:
    return run_dir / "logs" / f"{_FILE}-{start}.json"

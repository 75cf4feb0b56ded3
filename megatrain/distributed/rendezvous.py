"""How the ranks meet: at a store on rank 0, by its address and port. Who is missing is told, and when it is known.

A store outlives the ranks where torchrun's agents hold it, and no two agents count the same restarts. So rank 0 opens a
meeting, by a number that the store counts; the others come to the newest that is not over, and rank 0 ends it once all
are there. Whoever came to a meeting of ranks that have died goes on to the next. Each rank tells the store five things,
whatever their number, and looks once a second whether a newer meeting has begun.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

import orjson
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatrain.distributed.bootstrap import RankInfo, agents_hold_store, hosts_store
from megatrain.distributed.device import Seat, find_objection, has_gpu, take_seat
from megatrain.errors import MegatrainError, RankError

_RETRY_SECONDS, _LOOK_SECONDS, _PARTING_SECONDS = 0.5, 1.0, 10.0
_NUM_MEETINGS = "megatrain/num_meetings"
_HERE, _NUM_COMINGS = "megatrain/{}/here/{}", "megatrain/{}/num_comings/{}"
_NUM_HERE, _ALL_HERE, _OVER = "megatrain/{}/num_here", "megatrain/{}/all_here", "megatrain/{}/over"
_NUM_LEAVINGS, _ALL_LEFT = "megatrain/{}/num_leavings", "megatrain/{}/all_left"
_MOST_NAMED = 16
_STALE_AGENT = (
    " Where another node has replaced rank 0's, torchrun's agents may still give out the old address: export "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for them."
)


class RanksMissing(RankError):
    """Some ranks did not come. ``ranks``: their numbers."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class RanksUnfit(MegatrainError):
    """The ranks have met, and cannot train together. ``hosts``: those at fault."""

    def __init__(self, message: str, exit_code: int, hosts: Sequence[str]) -> None:
        super().__init__(message)
        self.exit_code, self.hosts = exit_code, tuple(hosts)


def meet(rank: RankInfo, wait_seconds: float, timeout_seconds: float) -> bool:
    """Make the default process group (NCCL on GPUs, gloo on CPUs), unless this process has one; whether it was made.

    Collective.

    ``wait_seconds``: how long to wait for the others; ``timeout_seconds``: of the group's collectives. Raises RankError
    where the port is in use, nobody listens there, or ranks are missing; RanksUnfit where GPUs are.
    """
    if dist.is_initialized():  # a process that trains a second time
        return False
    deadline = time.monotonic() + wait_seconds
    store = _host(rank, deadline) if hosts_store(rank) else _join(rank, deadline)
    meeting = _gather(rank, store, deadline)
    dist.init_process_group(
        "nccl" if has_gpu() else "gloo",
        store=PrefixStore(f"megatrain/{meeting}", store),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return True


def _host(rank: RankInfo, deadline: float) -> TCPStore:
    try:
        return _open_store(rank, deadline)
    except RuntimeError as error:
        if errno.errorcode[errno.EADDRINUSE] in str(error):
            raise RankError(
                f"Port {rank.master_port} on {socket.gethostname()}, at which the ranks are to meet, is in use by "
                "another process, perhaps a rank of an earlier start. End that one, or set MASTER_PORT to a port that "
                "is free."
            ) from None
        raise RankError(
            f"{_name(rank)} does not find itself at {_place(rank)}, where the ranks are to meet "
            f"({str(error).splitlines()[0]}). MASTER_ADDR must be a name or address of the machine of rank 0."
        ) from None


def _join(rank: RankInfo, deadline: float) -> TCPStore:
    """Connect to rank 0's store; not before somebody listens, for torch would complain of each attempt."""
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((rank.master_addr, rank.master_port), _RETRY_SECONDS).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                stale = _STALE_AGENT if agents_hold_store() else ""
                raise RankError(
                    f"{_name(rank)} waited {time.monotonic() - began:.0f} s for rank 0, but nobody answers at "
                    f"{_place(rank)} ({error.strerror or error}). Did rank 0 start there, and do the nodes reach each "
                    f"other at that address? Its log and the launcher's output tell; then start the run again.{stale}"
                ) from None
            time.sleep(_RETRY_SECONDS)
    try:
        return _open_store(rank, deadline)
    except RuntimeError:
        raise RankError(
            f"What {_name(rank)} found at {_place(rank)} is not rank 0 of this run: another program has that port, or "
            "rank 0 has ended. Look at its log, or set MASTER_PORT to a port that is free there."
        ) from None


def _open_store(rank: RankInfo, deadline: float) -> TCPStore:
    """The store's server on the rank that hosts it, and a connection to it. Raises RuntimeError where that fails.

    In a thread, for torch waits without end for the first word of a stranger who listens there and is silent.
    """
    seconds = max(deadline - time.monotonic(), 1.0)
    opened: Future[TCPStore] = Future()

    def open_it() -> None:
        try:
            opened.set_result(
                TCPStore(
                    rank.master_addr,
                    rank.master_port,
                    rank.world_size,
                    is_master=hosts_store(rank),
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,
                )
            )
        except RuntimeError as error:
            opened.set_exception(error)

    threading.Thread(target=open_it, name="rendezvous", daemon=True).start()
    try:
        return opened.result(seconds + _RETRY_SECONDS)
    except TimeoutError:
        raise RuntimeError(f"no answer in {seconds:.0f} s") from None


def _gather(rank: RankInfo, store: Store, deadline: float) -> int:
    """Wait until all ranks are there, and agree on what they compute; the number of their meeting."""
    began, meeting, seat = time.monotonic(), 0, take_seat()
    try:
        if rank.rank == 0:
            meeting = store.add(_NUM_MEETINGS, 1)
            _come(rank, store, meeting, seat)
            store.wait([_ALL_HERE.format(meeting)], timedelta(seconds=max(deadline - began, 1.0)))
            seats = store.multi_get([_HERE.format(meeting, number) for number in range(rank.world_size)])
            verdict = find_objection([Seat(*orjson.loads(told)) for told in seats])
            store.set(_OVER.format(meeting), orjson.dumps(verdict and tuple(verdict)).decode())
        while not (meeting and _is_over(store, meeting)):
            if time.monotonic() > deadline:
                raise dist.DistStoreError("some did not come")
            if (newest := _open_meeting(store)) not in (0, meeting):
                meeting = newest
                _come(rank, store, meeting, seat)
            elif not meeting:
                time.sleep(_RETRY_SECONDS)
        objection = orjson.loads(store.get(_OVER.format(meeting)))
        _part(rank, store, meeting)
    except RuntimeError as error:
        missing = _missing(rank, store, meeting)
        raise RanksMissing(
            f"{_name(rank)} waited {time.monotonic() - began:.0f} s at {_place(rank)} for all {rank.world_size} ranks: "
            f"{_count(missing)}. The launcher's output or those ranks' logs tell why; then start the run again.",
            missing or [0],
        ) from error
    if objection is not None:
        raise RanksUnfit(*objection)
    return meeting


def _open_meeting(store: Store) -> int:
    """The newest meeting, if it is not over; 0 where there is none."""
    newest = store.add(_NUM_MEETINGS, 0)
    return 0 if newest and store.check([_OVER.format(newest)]) else newest


def _come(rank: RankInfo, store: Store, meeting: int, seat: Seat) -> None:
    """Take part in a meeting. A rank that has been started again takes the place of its former self."""
    store.set(_HERE.format(meeting, rank.rank), orjson.dumps(tuple(seat)).decode())
    is_first = store.add(_NUM_COMINGS.format(meeting, rank.rank), 1) == 1
    if is_first and store.add(_NUM_HERE.format(meeting), 1) == rank.world_size:
        store.set(_ALL_HERE.format(meeting), "")


def _part(rank: RankInfo, store: Store, meeting: int) -> None:
    """Leave a meeting; rank 0, with which the store may end, not before all have heard how it ended."""
    if store.add(_NUM_LEAVINGS.format(meeting), 1) == rank.world_size:
        store.set(_ALL_LEFT.format(meeting), "")
    elif rank.rank == 0:
        with contextlib.suppress(dist.DistStoreError):
            store.wait([_ALL_LEFT.format(meeting)], timedelta(seconds=_PARTING_SECONDS))


def _is_over(store: Store, meeting: int) -> bool:
    """Whether the meeting ends within a moment."""
    try:
        store.wait([_OVER.format(meeting)], timedelta(seconds=_LOOK_SECONDS))
    except dist.DistStoreError:
        return False
    return True


def _missing(rank: RankInfo, store: Store, meeting: int) -> list[int]:
    """The ranks that have not come to the meeting; none where the store has gone."""
    try:
        return [number for number in range(rank.world_size) if not store.check([_HERE.format(meeting, number)])]
    except RuntimeError:
        return []


def _count(missing: list[int]) -> str:
    if not missing:
        return "rank 0 has gone"
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    return f"{len(missing)} did not come (rank {named}{', ...' if len(missing) > _MOST_NAMED else ''})"


def _name(rank: RankInfo) -> str:
    return f"Rank {rank.rank} on {socket.gethostname()}"


def _place(rank: RankInfo) -> str:
    return f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}"

"""How the ranks meet: at a store on rank 0, by its address and port. Who is missing is told, and when it is known.

Each rank says three things to the store, whatever their number; the store hears from all of them.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatrain.distributed.bootstrap import RankInfo, hosts_store, start_attempt
from megatrain.errors import RankError

_RETRY_SECONDS = 0.5
_HERE, _NUM_HERE, _ALL_HERE = "megatrain/here/{}", "megatrain/num_here", "megatrain/all_here"
_MOST_NAMED = 16


class RanksMissing(RankError):
    """Some ranks did not come. ``ranks``: their numbers."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


def meet(rank: RankInfo, wait_seconds: float, timeout_seconds: float) -> bool:
    """Make the default process group (NCCL on GPUs, gloo on CPUs), unless this process has one; whether it was made.

    Collective.

    ``wait_seconds``: how long to wait for the others; ``timeout_seconds``: of the group's collectives. Raises RankError
    where the port is in use, nobody listens there, or ranks are missing.
    """
    if dist.is_initialized():  # a process that trains a second time
        return False
    deadline = time.monotonic() + wait_seconds
    store = PrefixStore(
        f"attempt-{start_attempt()}", _host(rank, deadline) if hosts_store(rank) else _join(rank, deadline)
    )
    _wait_for_all(rank, store, deadline)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=store,
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
                raise RankError(
                    f"{_name(rank)} waited {time.monotonic() - began:.0f} s for rank 0, but nobody answers at "
                    f"{_place(rank)} ({error.strerror or error}). Did rank 0 start there, and do the nodes reach each "
                    "other at that address? Its log and the launcher's output tell; then start the run again."
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


def _wait_for_all(rank: RankInfo, store: Store, deadline: float) -> None:
    began = time.monotonic()
    try:
        store.set(_HERE.format(rank.rank), "")
        if store.add(_NUM_HERE, 1) == rank.world_size:
            store.set(_ALL_HERE, "")
        store.wait([_ALL_HERE], timedelta(seconds=max(deadline - began, 1.0)))
    except RuntimeError as error:
        missing = _missing(rank, store)
        raise RanksMissing(
            f"{_name(rank)} waited {time.monotonic() - began:.0f} s at {_place(rank)} for all {rank.world_size} ranks: "
            f"{_count(missing)}. The launcher's output or those ranks' logs tell why; then start the run again.",
            missing,
        ) from error


def _missing(rank: RankInfo, store: Store) -> list[int]:
    try:
        return [number for number in range(rank.world_size) if not store.check([_HERE.format(number)])]
    except RuntimeError:
        return [0]


def _count(missing: list[int]) -> str:
    if missing == [0]:
        return "rank 0 has gone"
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    return f"{len(missing)} did not come (rank {named}{', ...' if len(missing) > _MOST_NAMED else ''})"


def _name(rank: RankInfo) -> str:
    return f"Rank {rank.rank} on {socket.gethostname()}"


def _place(rank: RankInfo) -> str:
    return f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}"

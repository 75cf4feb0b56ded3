"""Rendezvous: all ranks join at a store on rank 0, by its address and port, and make the default process group.

A store outlives the ranks where torchrun's agents hold it, and no two agents count the same restarts. So rank 0 opens a
round, by a number that the store counts; the others join the newest that is not closed, and rank 0 closes it once all
have joined. Whoever joined a round of ranks that have died goes on to the next. Each rank writes five keys, whatever
their round_number, and looks once a second whether a newer round has begun.
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
from megatrain.distributed.device import DeviceAssignment, assigned_device, find_conflict, has_gpu
from megatrain.errors import MegatrainError, RankError

_FIRST_RETRY_SECONDS, _RETRY_SECONDS, _LOOK_SECONDS, _LEAVE_SECONDS = 0.02, 0.5, 1.0, 10.0
_NUM_ROUNDS = "megatrain/num_rounds"
_JOINED, _NUM_JOINS = "megatrain/{}/joined/{}", "megatrain/{}/num_joins/{}"
_NUM_JOINED, _ALL_JOINED, _CLOSED = "megatrain/{}/num_joined", "megatrain/{}/all_joined", "megatrain/{}/closed"
_NUM_LEFT, _ALL_LEFT = "megatrain/{}/num_left", "megatrain/{}/all_left"
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
    """The ranks have joined, and cannot train together. ``hosts``: those at fault."""

    def __init__(self, message: str, exit_code: int, hosts: Sequence[str]) -> None:
        super().__init__(message)
        self.exit_code, self.hosts = exit_code, tuple(hosts)


def init_process_group(rank: RankInfo, wait_seconds: float, timeout_seconds: float) -> bool:
    """Make the default process group (NCCL on GPUs, gloo on CPUs), unless this process has one; whether it was made.

    Collective.

    ``wait_seconds``: how long to wait for the others; ``timeout_seconds``: of the group's collectives. Raises RankError
    where the port is in use, nobody listens there, or ranks are missing; RanksUnfit where GPUs are.
    """
    if dist.is_initialized():  # a process that trains a second time
        return False
    deadline = time.monotonic() + wait_seconds
    store = _serve_store(rank, deadline) if hosts_store(rank) else _connect(rank, deadline)
    round_number = _rendezvous(rank, store, deadline)
    dist.init_process_group(
        "nccl" if has_gpu() else "gloo",
        store=PrefixStore(f"megatrain/{round_number}", store),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return True


def _serve_store(rank: RankInfo, deadline: float) -> TCPStore:
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
            f"{_name(rank)} does not find itself at {_address(rank)}, where the ranks are to meet "
            f"({str(error).splitlines()[0]}). MASTER_ADDR must be a name or address of the machine of rank 0."
        ) from None


def _connect(rank: RankInfo, deadline: float) -> TCPStore:
    """Connect to rank 0's store; not before somebody listens, for torch would complain of each attempt."""
    began, pause = time.monotonic(), _FIRST_RETRY_SECONDS
    while True:
        try:
            socket.create_connection((rank.master_addr, rank.master_port), _RETRY_SECONDS).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                stale = _STALE_AGENT if agents_hold_store() else ""
                raise RankError(
                    f"{_name(rank)} waited {time.monotonic() - began:.0f} s for rank 0, but nobody answers at "
                    f"{_address(rank)} ({error.strerror or error}). Did rank 0 start there, and do the nodes reach "
                    f"each other at that address? Its log and the launcher's output tell; then start the run "
                    f"again.{stale}"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, _RETRY_SECONDS)
    try:
        return _open_store(rank, deadline)
    except RuntimeError:
        raise RankError(
            f"What {_name(rank)} found at {_address(rank)} is not rank 0 of this run: another program has that port, "
            "or rank 0 has ended. Look at its log, or set MASTER_PORT to a port that is free there."
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


def _rendezvous(rank: RankInfo, store: Store, deadline: float) -> int:
    """Wait until all ranks are there, and agree on what they compute; the number of their round."""
    began, round_number, assignment = time.monotonic(), 0, assigned_device()
    pause = _FIRST_RETRY_SECONDS
    try:
        if rank.rank == 0:
            round_number = store.add(_NUM_ROUNDS, 1)
            _join_round(rank, store, round_number, assignment)
            store.wait([_ALL_JOINED.format(round_number)], timedelta(seconds=max(deadline - began, 1.0)))
            assignments = store.multi_get([_JOINED.format(round_number, peer) for peer in range(rank.world_size)])
            conflict = find_conflict([DeviceAssignment(*orjson.loads(each)) for each in assignments])
            store.set(_CLOSED.format(round_number), orjson.dumps(conflict and tuple(conflict)).decode())
        while not (round_number and _is_closed(store, round_number)):
            if time.monotonic() > deadline:
                raise dist.DistStoreError("some did not come")
            if (newest := _open_round(store)) not in (0, round_number):
                round_number = newest
                _join_round(rank, store, round_number, assignment)
            elif not round_number:
                time.sleep(pause)
                pause = min(2 * pause, _RETRY_SECONDS)
        conflict = orjson.loads(store.get(_CLOSED.format(round_number)))
        _leave(rank, store, round_number)
    except RuntimeError as error:
        missing = _missing(rank, store, round_number)
        raise RanksMissing(
            f"{_name(rank)} waited {time.monotonic() - began:.0f} s at {_address(rank)} for all {rank.world_size} "
            f"ranks: {_count(missing)}. The launcher's output or those ranks' logs tell why; then start the run again.",
            missing or [0],
        ) from error
    if conflict is not None:
        raise RanksUnfit(*conflict)
    return round_number


def _open_round(store: Store) -> int:
    """The newest round, if it is not closed; 0 where there is none."""
    newest = store.add(_NUM_ROUNDS, 0)
    return 0 if newest and store.check([_CLOSED.format(newest)]) else newest


def _join_round(rank: RankInfo, store: Store, round_number: int, assignment: DeviceAssignment) -> None:
    """Take part in a round. A rank that has been started again takes the place of its former self."""
    store.set(_JOINED.format(round_number, rank.rank), orjson.dumps(tuple(assignment)).decode())
    is_first = store.add(_NUM_JOINS.format(round_number, rank.rank), 1) == 1
    if is_first and store.add(_NUM_JOINED.format(round_number), 1) == rank.world_size:
        store.set(_ALL_JOINED.format(round_number), "")


def _leave(rank: RankInfo, store: Store, round_number: int) -> None:
    """Leave a round; rank 0, with which the store may end, not before all have heard how it ended."""
    if store.add(_NUM_LEFT.format(round_number), 1) == rank.world_size:
        store.set(_ALL_LEFT.format(round_number), "")
    elif rank.rank == 0:
        with contextlib.suppress(dist.DistStoreError):
            store.wait([_ALL_LEFT.format(round_number)], timedelta(seconds=_LEAVE_SECONDS))


def _is_closed(store: Store, round_number: int) -> bool:
    try:
        store.wait([_CLOSED.format(round_number)], timedelta(seconds=_LOOK_SECONDS))
    except dist.DistStoreError:
        return False
    return True


def _missing(rank: RankInfo, store: Store, round_number: int) -> list[int]:
    try:
        return [peer for peer in range(rank.world_size) if not store.check([_JOINED.format(round_number, peer)])]
    except RuntimeError:
        return []


def _count(missing: list[int]) -> str:
    if not missing:
        return "rank 0 has gone"
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    return f"{len(missing)} did not come (rank {named}{', ...' if len(missing) > _MOST_NAMED else ''})"


def _name(rank: RankInfo) -> str:
    return f"Rank {rank.rank} on {socket.gethostname()}"


def _address(rank: RankInfo) -> str:
    return f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}"

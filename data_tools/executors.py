"""The executors that units run on: local processes, the ranks of an MPI job, a Dask cluster; or a share of a whole.

Each is a `Pool`: at most a few calls for each worker are in flight. The only module that knows MPI and Dask.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait as wait_for_connections
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from data_tools.machine import cores_bound
from data_tools.memory import NO_BOUND, Memory, bound_memory
from data_tools.ranks import Ranks, find_ranks
from megatrain.errors import ConfigError, MegatrainError, RankError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a display for work of a name and a size; yields the function that is given what was done."""

WINDOW = 3
"""Calls in flight for each worker: schedulers suffer from long queues, and a result is dropped once it is there."""
PROGRESS_SECONDS = 0.25
MPI_POLL_SECONDS = 0.02
DASK_POLL_SECONDS = 5.0
DASK_WITHOUT_WORKERS_SECONDS = 600.0
MAX_LOST_WORKERS = 5
"""Workers that may die of one unit."""

worker_advance: ContextVar[Advance] = ContextVar("worker_advance", default=lambda amount: None)
"""Where a call tells what it has read, in a worker whose parent shows it."""


class Pool(Protocol):
    """Workers that call functions."""

    @property
    def count(self) -> int:
        """How many workers there are now."""

    @property
    def num_read(self) -> int | None:
        """What `worker_advance` was told so far in all workers; None where it does not get here."""

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]: ...

    def cause(self, error: BaseException, attempts: int) -> BaseException | None:
        """What to raise for the error of a call; None to submit it again."""


def run_all(
    pool: Pool, function: Callable[[Item], Result], items: Iterable[Item], num_workers: int, advance: Advance
) -> Iterator[tuple[Item, Result]]:
    """Call the function for each item; yields each with its result, in the order in which they end.

    An item is asked for when there is a worker for it. The first error ends the iteration. Any number of items may run
    twice. `advance` is called where the pool knows what is being read.
    """
    waiting = iter(items)
    running: dict[Future[Result], tuple[Item, int]] = {}
    done: SimpleQueue[Future[Result]] = SimpleQueue()
    num_shown = pool.num_read or 0

    def submit(item: Item, attempts: int = 1) -> None:
        future = pool.submit(function, item)
        running[future] = item, attempts
        future.add_done_callback(done.put)

    while True:
        window = num_workers if num_workers < pool.count else WINDOW * num_workers
        for item in islice(waiting, max(window - len(running), 0)):
            submit(item)
        if not running:
            return
        with suppress(Empty):
            future = done.get(timeout=PROGRESS_SECONDS)
            item, attempts = running.pop(future)
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                yield item, future.result()
            elif (cause := pool.cause(error, attempts)) is None:
                submit(item, attempts + 1)
            else:
                raise cause
        if pool.num_read is not None:
            advance(pool.num_read - num_shown)
            num_shown = pool.num_read


class LocalPool:
    """Processes of this machine, spawned when they are needed. They end when this one does, however it does."""

    def __init__(self, num_workers: int) -> None:
        self.count = num_workers
        self._executor: ProcessPoolExecutor | None = None
        self._others: set[BaseProcess] = set()
        self._workers: set[BaseProcess] = set()
        self._num_read: Synchronized[int] | None = None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._see_workers()
            for worker in self._workers:
                worker.terminate()
            self._executor.shutdown(cancel_futures=True)

    @property
    def num_read(self) -> int:
        return self._num_read.value if self._num_read else 0

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        if self._executor is None:
            context = get_context("spawn")  # the encoders' threads do not survive a fork
            self._others, self._num_read = set(active_children()), context.Value("q", 0)
            self._executor = ProcessPoolExecutor(self.count, context, _start_worker, (self._num_read,))
        try:
            future = self._executor.submit(function, *arguments)
        except BrokenProcessPool:  # they died while there was nothing to do
            raise self._death() from None
        self._see_workers()
        return future

    def cause(self, error: BaseException, attempts: int) -> BaseException:
        return self._death() if isinstance(error, BrokenProcessPool) else error

    def _see_workers(self) -> None:
        self._workers |= set(active_children()) - self._others

    def _death(self) -> RankError:
        """What to say of the worker that died first; the pool ends all others with SIGTERM."""
        for worker in self._workers:
            worker.join()
        codes = {worker.exitcode or 0 for worker in self._workers} - {0, -signal.SIGTERM} or {-signal.SIGTERM}
        code = codes.pop()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return RankError(
            f"A worker process {how} in the middle of its work (out of memory?). Nothing half written was kept: "
            "run the same command again to go on, with fewer --workers if memory was short."
        )


def _start_worker(num_read: Synchronized[int]) -> None:
    """What a new worker process does before its first call."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    limit_threads(1)

    def advance(amount: int) -> None:
        with num_read.get_lock():
            num_read.value += amount

    worker_advance.set(advance)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait_for_connections([parent.sentinel])
        os._exit(1)


def limit_threads(num_threads: int) -> None:
    """Bound the encoders' own thread pools, in a process that has not used them yet."""
    os.environ.update(RAYON_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="true" if num_threads > 1 else "false")


@dataclass(frozen=True)
class MpiPool:
    """The ranks of an MPI job but for rank 0, which submits."""

    executor: Any
    count: int
    num_read: None = None

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        future: Future[Result] = self.executor.submit(function, *arguments)
        return future

    def cause(self, error: BaseException, attempts: int) -> BaseException:
        return error


@contextmanager
def mpi_pool(ranks: Ranks, report: Callable[[BaseException], int]) -> Iterator[MpiPool | None]:
    """The pool on rank 0; None on the others, once they have served. An error of any ends all, as `report` says."""
    from mpi4py.futures import MPICommExecutor

    try:
        with MPICommExecutor(ranks.comm, root=0, backoff=MPI_POLL_SECONDS) as executor:
            try:
                yield None if executor is None else MpiPool(executor, ranks.size - 1)
            except BaseException as error:  # noqa: BLE001 (it ends all ranks)
                ranks.abort(report(error))
    except Exception:  # noqa: BLE001 (likewise)
        traceback.print_exc()
        ranks.abort(1)


class DaskPool:
    """The workers of a Dask cluster, which may come and go. What a dead one was doing runs elsewhere."""

    def __init__(self, client: Any) -> None:
        self.num_read = None
        self._client = client
        self._executor: Executor = client.get_executor(pure=False, retries=0)
        self._num_workers = len(client.nthreads())
        self._asked = self._seen = time.monotonic()

    @property
    def count(self) -> int:
        now = time.monotonic()
        if now - self._asked > DASK_POLL_SECONDS:
            self._num_workers, self._asked = len(self._client.nthreads()), now
        if self._num_workers:
            self._seen = now
        elif now - self._seen > DASK_WITHOUT_WORKERS_SECONDS:
            raise Unfinished(
                f"The Dask cluster has had no worker for {DASK_WITHOUT_WORKERS_SECONDS / 60:.0f} minutes. "
                "What is done is kept: start the same command again when it has some."
            )
        return max(self._num_workers, 1)

    @property
    def memory_bytes(self) -> int:
        """The least that a worker may hold before its nanny ends it; as good as no bound where there is none."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return min((each["memory_limit"] or NO_BOUND.num_bytes for each in workers), default=NO_BOUND.num_bytes)

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        return self._executor.submit(function, *arguments)

    def cause(self, error: BaseException, attempts: int) -> BaseException | None:
        from distributed import KilledWorker

        if isinstance(error, CancelledError):
            return RankError("The Dask scheduler is gone. What is done is kept: start the same command again.")
        if isinstance(error, KilledWorker):
            if attempts < MAX_LOST_WORKERS:
                return None
            return RankError(f"A unit was running on {attempts} sets of Dask workers that died (out of memory?).")
        return error


@contextmanager
def dask_pool(cluster: str, allow_plain: bool) -> Iterator[DaskPool]:
    """The workers of the cluster at an address, or in a scheduler file. Raises ConfigError where it cannot serve."""
    try:
        from distributed import Client
    except ImportError:
        raise ConfigError("--dask needs the package distributed: pip install 'megatrain[dask]'.") from None
    where = {"address": cluster} if "://" in cluster else {"scheduler_file": cluster}
    if "scheduler_file" in where and not Path(cluster).is_file():
        raise ConfigError(f"--dask {cluster} is neither an address such as tls://host:8786 nor a scheduler file.")
    for name in (
        "distributed",
        "distributed.client",
        "tornado.application",
    ):  # they show as tracebacks what is raised here too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client: Any = Client(**where, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dask {cluster}: no Dask scheduler answers there ({error}).") from None
    with client:
        address = client.scheduler.address
        is_local = address.startswith(("tcp://127.", "tcp://[::1]", "inproc://"))
        if not (address.startswith("tls://") or is_local or allow_plain):
            raise ConfigError(
                f"--dask {cluster}: {address} is not encrypted, and such a scheduler runs what anyone who reaches it "
                "sends. Start it with TLS, or give --dask-plain if its network is closed."
            )
        threads = client.nthreads()
        several = [address for address, number in threads.items() if number > 1]
        if several:
            raise ConfigError(
                f"--dask {cluster}: {len(several)} workers have more than one thread, such as {several[0]}. "
                "Start them with --nthreads 1 and more --nworkers."
            )
        yield DaskPool(client)


class Unfinished(MegatrainError):
    """Units are missing that others were to run. The same command goes on."""

    exit_code = 75


@dataclass(frozen=True)
class Share:
    """This process's share of each stage; other processes, which it does not communicate with, do the others."""

    index: int
    count: int
    job: str = ""
    """Names the tasks that run at the same time: they share what was missing as the first of them began."""

    @property
    def name(self) -> str:
        return f"share {self.index + 1} of {self.count}"

    @staticmethod
    def parse(text: str) -> Share:
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ConfigError(f"--share {text} should be K/N, with K from 1 to N, such as 3/64.")
        return Share(int(index) - 1, int(count))


@dataclass(frozen=True)
class Place:
    """Where units run, and which of them."""

    pool: Pool
    share: Share | None = None
    memory: Memory = NO_BOUND
    """Of each worker, and of this process."""


@contextmanager
def find_place(
    report: Callable[[BaseException], int],
    workers: int | None = None,
    share: str | None = None,
    dask: str | None = None,
    dask_plain: bool = False,
    max_memory: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Place | None]:
    """Where this process's units run, by its options or its launcher; None for a worker, once it has served.

    `report` shows an error that ends all ranks of an MPI job, and gives the exit code; `say` is told how many workers
    there may be. Raises ConfigError for options
    that do not go together.
    """
    ranks = find_ranks()
    given = {"--workers": workers, "--share": share, "--dask": dask}
    named = " and ".join(key for key, value in given.items() if value is not None)
    if ranks.uses_mpi and named:
        raise ConfigError(f"{named} would do nothing under MPI: all ranks but the first are workers. Leave it out.")
    if dask is not None and (workers or share or ranks.size > 1):
        raise ConfigError("--dask uses the workers of its cluster, from one process: leave out --workers and --share.")
    if dask_plain and dask is None:
        raise ConfigError("--dask-plain would do nothing without --dask.")
    limit_threads(min(workers or ranks.num_cores(), ranks.num_cores()) if dask is None and not ranks.uses_mpi else 1)
    if ranks.uses_mpi:
        with mpi_pool(ranks, report) as mpi:
            yield None if mpi is None else Place(mpi, memory=bound_memory(max_memory, ranks.memory_bytes(), 1))
    elif dask is not None:
        with dask_pool(dask, dask_plain) as cluster:
            yield Place(cluster, memory=bound_memory(max_memory, cluster.memory_bytes, 1))
    else:
        if workers is None:
            say(f"Workers: up to {ranks.num_cores()}, one a core ({cores_bound(ranks.num_local)}).")
        found = Share(ranks.rank, ranks.size, ranks.job) if ranks.size > 1 else None
        count = workers or ranks.num_cores()
        memory = bound_memory(max_memory, ranks.memory_bytes(), count + 1)
        with LocalPool(count) as pool:
            yield Place(pool, found if share is None else Share.parse(share), memory)

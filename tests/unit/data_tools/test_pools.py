"""What is in flight on an executor, and which Dask clusters are taken."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from data_tools import executors
from data_tools.executors import WINDOW, DaskPool, Unfinished, dask_pool, run_all
from megatrain.errors import ConfigError, RankError

distributed = pytest.importorskip("distributed")


class Threads:
    """A pool of threads of this process."""

    num_read = None

    def __init__(self, count: int) -> None:
        self.count = count
        self._executor = ThreadPoolExecutor(count)

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        return self._executor.submit(function, *arguments)

    def cause(self, error: BaseException, attempts: int) -> BaseException | None:
        return None if attempts < 3 else error


def test_few_calls_wait_for_each_worker() -> None:
    asked = 0
    most = 0
    ended: list[int] = []

    def items() -> Iterator[int]:
        nonlocal asked
        for number in range(50):
            asked += 1
            yield number

    def call(number: int) -> int:
        nonlocal most
        most = max(most, asked - len(ended))
        return -number

    for number, result in run_all(Threads(2), call, items(), 2, lambda amount: None):
        assert result == -number
        ended.append(number)
    assert sorted(ended) == list(range(50))
    assert most <= WINDOW * 2 + 2


def test_what_a_lost_worker_did_runs_again() -> None:
    failures: dict[int, int] = {}
    lock = threading.Lock()

    def call(number: int) -> int:
        with lock:
            failures[number] = failures.get(number, 0) + 1
        if failures[number] <= number:
            raise OSError("lost")
        return number

    done = dict(run_all(Threads(2), call, range(3), 2, lambda amount: None))
    assert done == {0: 0, 1: 1, 2: 2}
    with pytest.raises(OSError, match="lost"):
        list(run_all(Threads(2), lambda number: call(9), [9], 1, lambda amount: None))


@contextmanager
def cluster(num_workers: int, threads: int = 1) -> Iterator[str]:
    options = {"dashboard_address": None, "processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    with distributed.LocalCluster(n_workers=num_workers, threads_per_worker=threads, **options) as local:
        yield local.scheduler_address


def test_dask_workers_of_two_threads_are_refused() -> None:
    with cluster(1, threads=2) as address, pytest.raises(ConfigError, match="--nthreads 1"), dask_pool(address, False):
        pass


def test_dask_without_workers_ends_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "DASK_WITHOUT_WORKERS_SECONDS", 0.0)
    monkeypatch.setattr(executors, "DASK_POLL_SECONDS", 0.0)
    with cluster(0) as address, dask_pool(address, False) as pool:
        with pytest.raises(Unfinished, match="no worker") as caught:
            list(run_all(pool, abs, [1], 1, lambda amount: None))
        assert caught.value.exit_code == 75
        assert_killers_are_bounded(pool)


def assert_killers_are_bounded(pool: DaskPool) -> None:
    """A unit of which workers die is sent again, but not for ever."""
    killed = distributed.KilledWorker("unit", None, 3)
    assert [pool.cause(killed, attempts) for attempts in range(1, executors.MAX_LOST_WORKERS)] == [None] * 4
    assert isinstance(pool.cause(killed, executors.MAX_LOST_WORKERS), RankError)


def test_units_never_load_mpi() -> None:
    script = (
        "import sys, data_tools.encode, data_tools.assemble, data_tools.clean.split; print('mpi4py' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"

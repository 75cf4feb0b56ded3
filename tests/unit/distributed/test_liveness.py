"""Who hears of a death, and of what else not. Ranks are processes, forked from one that has no torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from megatrain.distributed import liveness
from megatrain.distributed.activity import Activity
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.liveness import LivenessMonitor, has_everyone_joined
from megatrain.errors import Preempted
from tests.runs import wait_until

NUM_RANKS = 4
HANG_SECONDS = 1.0


def _rank(rank: int, run_dir: Path, orders: Connection, told_to_end: bool) -> None:
    """A rank that does as it is told, and says what it hears."""

    def die(report: str) -> None:
        orders.send(report)
        os._exit(5)

    info = RankInfo(rank, NUM_RANKS, rank, NUM_RANKS, "test", "127.0.0.1", 1)
    try:
        with LivenessMonitor(info, run_dir, "start", die, lambda: told_to_end) as monitor:
            order = orders.recv()
            if order.startswith("be in "):
                activity = Activity()
                activity.enter(7, order.removeprefix("be in "))
                monitor.watch(activity, HANG_SECONDS, run_dir / f"rank-{rank}.log")
                order = orders.recv()
            if order == "lose a peer":
                raise RuntimeError("Connection closed by peer")
            if order == "fail":
                raise ValueError("an error of its own")
            if order == "be preempted":
                raise Preempted("saved")
    except (ValueError, Preempted):
        pass
    orders.send("ended by itself")


class Ranks:
    """Some ranks of a run, and what they are told and say."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._context = run_dir, multiprocessing.get_context("fork")
        self.processes: dict[int, BaseProcess] = {}
        self.orders: dict[int, Connection] = {}

    def start(self, *ranks: int, told_to_end: bool = False) -> None:
        for rank in ranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_rank, args=(rank, self._run_dir, theirs, told_to_end))
            process.start()
            theirs.close()
            self.processes[rank], self.orders[rank] = process, ours

    def start_all(self) -> None:
        """Until they have met."""
        self.start(*range(NUM_RANKS))
        wait_until(lambda: has_everyone_joined(self._run_dir, "start"))

    def hears(self, rank: int, within_seconds: float = 20.0) -> str:
        assert self.orders[rank].poll(within_seconds), f"rank {rank} heard nothing"
        heard: str = self.orders[rank].recv()
        return heard

    def hear_nothing(self, *ranks: int, for_seconds: float) -> bool:
        end = time.monotonic() + for_seconds
        return not any(self.orders[rank].poll(max(end - time.monotonic(), 0.0)) for rank in ranks)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(liveness, "_FAILED_SECONDS", 3.0)
    monkeypatch.setattr(liveness, "_JOIN_SECONDS", 2.0)
    monkeypatch.setattr(liveness, "_ANSWER_SECONDS", 2.0)
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes.values():
        process.kill()
        process.join()


def _kill(ranks: Ranks, *numbers: int) -> None:
    for number in numbers:
        os.kill(ranks.processes[number].pid or 0, signal.SIGKILL)


@pytest.mark.parametrize("dead", [(2,), (0,), (1, 3)])
def test_all_hear_within_seconds_who_has_died(dead: tuple[int, ...], ranks: Ranks) -> None:
    ranks.start_all()
    _kill(ranks, *dead)
    names = ", ".join(f"rank {rank} on {socket.gethostname()}" for rank in dead)
    for rank in set(range(NUM_RANKS)) - {*dead}:
        heard = ranks.hears(rank)
        assert f"R{names[1:]}: killed, or crashed" in heard
        assert "Start the run again" in heard


def test_a_death_before_all_ranks_joined_is_reported(ranks: Ranks) -> None:
    ranks.start(0, 2, 3)
    time.sleep(0.7)
    _kill(ranks, 3)
    assert "Rank 3 on " in ranks.hears(0)
    assert "Rank 3 on " in ranks.hears(2)


def test_a_stopped_rank_is_not_presumed_dead(ranks: Ranks) -> None:
    ranks.start_all()
    os.kill(ranks.processes[1].pid or 0, signal.SIGSTOP)
    assert ranks.hear_nothing(0, 2, 3, for_seconds=2.0)


@pytest.mark.parametrize("order", ["end", "be preempted"])
def test_ranks_that_end_well_alarm_nobody(order: str, ranks: Ranks) -> None:
    ranks.start_all()
    for rank in (1, 0, 3):  # one after the other, rank 0 before another
        ranks.orders[rank].send(order)
        assert ranks.hears(rank) == "ended by itself"
    assert ranks.hear_nothing(2, for_seconds=2.0)
    ranks.orders[2].send(order)
    assert ranks.hears(2) == "ended by itself"


@pytest.mark.slow
def test_an_error_leaves_others_time_to_notice_themselves(ranks: Ranks) -> None:
    ranks.start_all()
    ranks.orders[2].send("fail")
    assert ranks.hears(2) == "ended by itself"
    assert ranks.hear_nothing(0, 1, 3, for_seconds=2.0)
    for rank in (0, 1, 3):
        assert "ended with an error of its own" in ranks.hears(rank)


def test_losing_a_peer_in_a_collective_names_it(ranks: Ranks) -> None:
    ranks.start_all()
    _kill(ranks, 3)
    ranks.orders[1].send("lose a peer")
    assert "Rank 3 on " in ranks.hears(1)


def test_ranks_told_to_end_await_no_missing_rank(ranks: Ranks) -> None:
    ranks.start(0, 1, told_to_end=True)
    assert "was told to end while the ranks were starting" in ranks.hears(0)
    assert "was told to end while the ranks were starting" in ranks.hears(1) or "Rank 0" in ranks.hears(1)


def test_remains_of_an_earlier_start_are_ignored(ranks: Ranks, tmp_path: Path) -> None:
    earlier = tmp_path / "logs" / "liveness-start.json"
    earlier.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        earlier.write_text(json.dumps({"port": gone.getsockname()[1], "token": "another", "all_joined": True}))
    ranks.start(3, 2, 1)
    time.sleep(0.5)
    ranks.start(0)
    time.sleep(0.7)
    _kill(ranks, 1)
    assert all("Rank 1 on " in ranks.hears(rank) for rank in (0, 2, 3))


def test_a_thousand_ranks_hear_of_a_death_quickly(tmp_path: Path) -> None:
    size, reports = 1000, []
    with LivenessMonitor(RankInfo(0, size, 0, 1, "test", "127.0.0.1", 1), tmp_path, "start", reports.append):
        record = json.loads((tmp_path / "logs" / "liveness-start.json").read_text())
        port, token = record["port"], record["token"]
        assert not has_everyone_joined(tmp_path, "start")
        began = time.monotonic()
        stranger = socket.create_connection(("127.0.0.1", port), timeout=20.0)
        stranger.sendall(b"hello you\n")
        assert stranger.makefile().read() == ""
        others = [socket.create_connection(("127.0.0.1", port), timeout=20.0) for _ in range(1, size)]
        for rank, other in enumerate(others, 1):
            other.sendall(f"hello {token} {rank} node{rank // 8}\n".encode())
        heard = [other.makefile() for other in others]
        assert all(file.readline().startswith(f"hello {token} 0 ") and file.readline() == "joined\n" for file in heard)
        assert has_everyone_joined(tmp_path, "start")
        others[76].close()
        heard[76].close()
        told = [file.readline() for number, file in enumerate(heard) if number != 76]
        assert time.monotonic() - began < 10.0
    assert told == [f"end {reports[0]}\n"] * (size - 2)
    assert reports[0].startswith("Rank 77 on node9: killed, or crashed")
    for other in others:
        other.close()


def _stand(ranks: Ranks, **part_of: str) -> None:
    """All are in an exchange, but for those that are named, and get nothing done."""
    ranks.start_all()
    for rank in range(NUM_RANKS):
        ranks.orders[rank].send(f"be in {part_of.get(f'rank{rank}', 'exchange')}")


def test_a_lagging_rank_is_named_stacks_are_dumped(ranks: Ranks, tmp_path: Path) -> None:
    _stand(ranks, rank2="data")
    host = socket.gethostname()
    for rank in range(NUM_RANKS):
        report = ranks.hears(rank)
        assert f"Nothing has moved for 1 s (train.hang_timeout_seconds): the others wait for rank 2 on {host}" in report
        assert "in data of step 8 at step 8" in report
        assert "in _rank" in (tmp_path / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize("stopped", [3, 0])
@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_others(stopped: int, ranks: Ranks) -> None:
    _stand(ranks)
    os.kill(ranks.processes[stopped].pid or 0, signal.SIGSTOP)
    named = "rank 0, which does not answer," if stopped == 0 else f"rank 3 on {socket.gethostname()}, stopped or gone,"
    for rank in set(range(NUM_RANKS)) - {stopped}:
        assert f"the others wait for {named}" in ranks.hears(rank)


@pytest.mark.slow
def test_a_suspended_job_goes_on_once_resumed(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HANG_SECONDS", 5.0)
    _stand(ranks)
    pids = [process.pid or 0 for process in ranks.processes.values()]
    for number, seconds in ((signal.SIGCONT, 1.0), (signal.SIGSTOP, 6.0), (signal.SIGCONT, 3.0)):
        for pid in pids:
            os.kill(pid, number)
        assert ranks.hear_nothing(*range(NUM_RANKS), for_seconds=seconds)


def test_a_rank_alone_needs_nobody(tmp_path: Path) -> None:
    alarmed: list[str] = []
    end: Callable[[str], None] = alarmed.append
    with LivenessMonitor(RankInfo(0, 1, 0, 1, "test", "127.0.0.1", 1), tmp_path, "start", end):
        assert not (tmp_path / "logs").exists()
    assert not alarmed

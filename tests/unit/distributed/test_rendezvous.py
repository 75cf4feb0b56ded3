"""Ranks that do not find each other: who is told what, with real processes and ports."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from megatrain.distributed.bootstrap import free_port

RANKS = """
    import json, multiprocessing, os, sys
    from megatrain.distributed.bootstrap import RankInfo
    from megatrain.distributed.rendezvous import init_process_group

    def run(pipe, rank, size, address, port, wait_seconds, environment):
        os.environ.update(environment)
        try:
            init_process_group(RankInfo(rank, size, 0, 1, "test", address, port), wait_seconds, 60.0)
            pipe.send("met")
        except Exception as error:
            pipe.send(str(error))
        os._exit(0)  # as the trainer does

    multiprocessing.set_start_method("fork")  # torch is loaded once
    pipes = []
    for case in json.load(sys.stdin):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        multiprocessing.Process(target=run, args=(theirs, *case)).start()
        pipes.append(ours)
    json.dump([pipe.recv() for pipe in pipes], sys.stdout)
"""


class Rank(NamedTuple):
    """One that meets others."""

    rank: int
    size: int
    address: str
    port: int
    wait_seconds: float
    environment: Mapping[str, str] = {}


def told(*ranks: Rank) -> list[str]:
    """What each of these ranks, started together, learns."""
    command = [sys.executable, "-c", textwrap.dedent(RANKS)]
    ended = subprocess.run(command, input=json.dumps(ranks), capture_output=True, text=True, timeout=120, check=True)
    answers: list[str] = json.loads(ended.stdout.splitlines()[-1])  # older gloo prints some of its own
    return answers


@pytest.mark.slow
def test_ranks_meet_or_learn_who_is_missing() -> None:
    here = "127.0.0.1"
    silent, taken = socket.create_server(("", 0)), socket.create_server(("", 0))
    unheard, held = silent.getsockname()[1], taken.getsockname()[1]
    nowhere, meeting, waiting, refusing = (free_port() for _ in range(4))
    for_gpus = {"SLURM_GPUS_ON_NODE": "8"}
    *refused, nobody, stranger, in_use, elsewhere, missing, first, second, third = told(
        Rank(0, 2, here, refusing, 60.0),
        Rank(1, 2, here, refusing, 60.0, for_gpus),
        Rank(1, 2, here, nowhere, 1.0),
        Rank(1, 2, here, unheard, 1.0),
        Rank(0, 2, here, held, 60.0),
        Rank(0, 2, "no-such-host.invalid", free_port(), 1.0),
        Rank(0, 3, here, waiting, 2.0),
        *(Rank(number, 3, here, meeting, 60.0) for number in (2, 1, 0)),
    )
    assert [first, second, third] == ["met"] * 3
    without = "The job was started for GPUs (SLURM_GPUS_ON_NODE=8), but 2 of 2 ranks have none. rank 0 on "
    assert all(text.startswith(without) for text in refused), refused
    assert f"nobody answers at MASTER_ADDR=127.0.0.1, MASTER_PORT={nowhere} (Connection refused)" in nobody
    assert f"MASTER_PORT={unheard} is not rank 0 of this run" in stranger
    assert f"Port {held} on {socket.gethostname()}, at which the ranks are to meet, is in use" in in_use
    assert "does not find itself at MASTER_ADDR=no-such-host.invalid" in elsewhere
    assert f"MASTER_PORT={waiting} for all 3 ranks: 2 did not come (rank 1, 2)" in missing


AGENTS = """
    import multiprocessing, os, time
    from torch.distributed import TCPStore
    from megatrain.distributed.bootstrap import RankInfo, free_port
    from megatrain.distributed.rendezvous import init_process_group
    from megatrain.errors import MegatrainError

    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", DS_ACCELERATOR="cpu")
    multiprocessing.set_start_method("fork")

    def hold_store(ports):  # in a process of its own: what is forked beside a server's thread may inherit its locks
        store = TCPStore("127.0.0.1", 0, is_master=True)
        ports.put(store.port)
        time.sleep(600)

    ports = multiprocessing.SimpleQueue()
    multiprocessing.Process(target=hold_store, args=(ports,), daemon=True).start()
    port = ports.get()

    def run(rank, size, restarts, wait_seconds):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = restarts
        try:
            init_process_group(RankInfo(rank, size, 0, 1, "test", "127.0.0.1", port), wait_seconds, 30.0)
        except MegatrainError:
            os._exit(1)
        time.sleep(0.5)
        os._exit(0)

    def start(rank, size=2, restarts="0", wait_seconds=30.0):
        process = multiprocessing.Process(target=run, args=(rank, size, restarts, wait_seconds))
        process.start()
        return process

    def check_codes(expected, *processes):
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert codes == expected, codes

    check_codes([0, 0], start(0), start(1))
    early = start(1, restarts="0")  # a new agent's: it finds the round that is closed
    time.sleep(1.0)
    check_codes([0, 0], start(0, restarts="1"), early)
    dead = start(0, restarts="2")  # opens a round, and dies in it
    store = TCPStore("127.0.0.1", port)
    while int(store.add("megatrain/num_rounds", 0)) < 3:
        time.sleep(0.05)
    dead.kill()
    early, *others = [start(1, size=3), start(2, size=3, restarts="5")]
    time.sleep(2.0)
    check_codes([0, 0, 0], start(0, size=3), early, *others)
    check_codes([1], start(1, wait_seconds=2.0))
"""


@pytest.mark.slow
def test_ranks_meet_whatever_their_agents_have_counted() -> None:
    """torchrun's agents hold the store from one start of the ranks to the next, and count restarts each for itself."""
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(AGENTS)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr

"""Ranks that do not find each other: who is told what, with real processes and ports."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from typing import NamedTuple

from megatrain.distributed.bootstrap import free_port

RANKS = """
    import json, multiprocessing, os, sys
    from megatrain.distributed.bootstrap import RankInfo
    from megatrain.distributed.rendezvous import meet
    from megatrain.errors import RankError

    def run(pipe, rank, size, address, port, wait_seconds):
        try:
            meet(RankInfo(rank, size, 0, 1, "test", address, port), wait_seconds, 60.0)
            pipe.send("met")
        except RankError as error:
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


def told(*ranks: Rank) -> list[str]:
    """What each of these ranks, started together, learns."""
    command = [sys.executable, "-c", textwrap.dedent(RANKS)]
    ended = subprocess.run(command, input=json.dumps(ranks), capture_output=True, text=True, timeout=120, check=True)
    answers: list[str] = json.loads(ended.stdout.splitlines()[-1])  # older gloo prints some of its own
    return answers


def test_ranks_meet_or_are_told_who_is_missing_and_where() -> None:
    here = "127.0.0.1"
    silent, taken = socket.create_server(("", 0)), socket.create_server(("", 0))
    unheard, held = silent.getsockname()[1], taken.getsockname()[1]
    nowhere, meeting, waiting = free_port(), free_port(), free_port()
    nobody, stranger, in_use, elsewhere, missing, *met = told(
        Rank(1, 2, here, nowhere, 1.0),
        Rank(1, 2, here, unheard, 1.0),
        Rank(0, 2, here, held, 60.0),
        Rank(0, 2, "no-such-host.invalid", free_port(), 1.0),
        Rank(0, 3, here, waiting, 2.0),
        *(Rank(number, 3, here, meeting, 60.0) for number in (2, 1, 0)),
    )
    assert met == ["met"] * 3
    assert f"nobody answers at MASTER_ADDR=127.0.0.1, MASTER_PORT={nowhere} (Connection refused)" in nobody
    assert f"MASTER_PORT={unheard} is not rank 0 of this run" in stranger
    assert f"Port {held} on {socket.gethostname()}, at which the ranks are to meet, is in use" in in_use
    assert "does not find itself at MASTER_ADDR=no-such-host.invalid" in elsewhere
    assert f"MASTER_PORT={waiting} for all 3 ranks: 2 did not come (rank 1, 2)" in missing

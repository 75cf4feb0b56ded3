"""Fixed pieces of work, timed: on equal devices, disks and links they take equally long, but where one is bad."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatrain.distributed.causes import is_lost_peer, last_words
from megatrain.distributed.failures import LostPeer

_SIZE, _REPEATS = {"cuda": 4096, "cpu": 384}, {"cuda": 20, "cpu": 125}
"""On a core of a CPU some 0.15 s: longer than the period in which a control group shares out time (0.1 s)."""
_LONG_WRITE_SECONDS, _LONG_EXCHANGE_SECONDS = 3.0, 0.1
"""After so long a part tells enough of the whole: a bad disk or link must not make the probe itself take minutes."""


class LinkTime(NamedTuple):
    """Seconds of an all-reduce of two ranks, of a few bytes and of many."""

    latency_seconds: float
    exchange_seconds: float


def arithmetic_seconds(device: torch.device, share: float = 1.0) -> float:
    """Seconds that the same matrix products, or a ``share`` of them, take on ``device`` with all threads of torch."""
    kind = device.type if device.type in _SIZE else "cpu"
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    x = torch.full((_SIZE[kind], _SIZE[kind]), 1.0 / _SIZE[kind], dtype=dtype, device=device)
    x @ x  # the first one makes what libraries keep
    _wait(device)
    began = time.perf_counter()
    for _ in range(round(_REPEATS[kind] * share)):
        x = x @ x
    _wait(device)
    return time.perf_counter() - began


def write_seconds(folder: Path, num_bytes: int) -> float:
    """Seconds that it takes to write so many bytes, a MiB at a time, onto the disk; they are removed again.

    For one rank of a host. Raises OSError.
    """
    path, block = folder / f".probe-{socket.gethostname()}", os.urandom(min(num_bytes, 1 << 20))
    num_blocks, num_written, seconds = num_bytes // len(block), 0, 0.0
    began = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while num_written < num_blocks and seconds < _LONG_WRITE_SECONDS:
                file.write(block)
                os.fsync(file.fileno())
                num_written, seconds = num_written + 1, time.perf_counter() - began
        return seconds * num_blocks / num_written
    finally:
        path.unlink(missing_ok=True)


def next_link(rank: int, world_size: int, num_bytes: int, device: torch.device) -> LinkTime | None:
    """The link of this rank to the next one in the ring of all; None on the last of two, and where there is one rank.

    Collective over the default process group. Each rank talks to one neighbour at a time, so the time does not grow
    with the ranks. Raises LostPeer for a silent one, and what else goes wrong as it is.
    """
    found = None
    for peer in neighbours(rank, world_size):
        try:
            link = _link(peer, num_bytes, device)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            text = f"rank {rank} on {socket.gethostname()} hears nothing from rank {peer} ({last_words(error)})"
            raise LostPeer(text) from None
        if peer == (rank + 1) % world_size and (rank == 0 or world_size > 2):
            found = link
    return found


def neighbours(rank: int, world_size: int) -> list[int]:
    """The ranks before and after this one in the ring of all, in the order to talk to them: each of the other's turns
    is the same as ours, so that nobody waits for a third one."""
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    if world_size < 3:
        return [after] if after != rank else []

    def turn(left: int) -> int:
        """When a link is used, by the rank that it begins at; in an odd ring the last one needs a turn of its own."""
        return 2 if left == world_size - 1 and world_size % 2 else left % 2

    return [peer for _, peer in sorted([(turn(rank), after), (turn(before), before)])]


def _link(peer: int, num_bytes: int, device: torch.device) -> LinkTime:
    word = torch.zeros(1, dtype=torch.int64, device=device)
    _sum_of_two(word, peer, device)  # the first one connects
    latency = _best_of(10, word, peer, device)
    seconds = size = 0.0
    for size in (num_bytes // 256, num_bytes // 16, num_bytes):
        seconds = _best_of(3, torch.zeros(size // 4, dtype=torch.float32, device=device), peer, device)
        if seconds > _LONG_EXCHANGE_SECONDS:
            break
    return LinkTime(latency, seconds * num_bytes / size)


def _best_of(num: int, x: torch.Tensor, peer: int, device: torch.device) -> float:
    """Seconds of the quickest of at most so many all-reduces; both ends get the same, and so stop together."""
    best, spent = math.inf, 0.0
    for _ in range(num):
        began = time.perf_counter()
        _sum_of_two(x, peer, device)
        own = torch.tensor([time.perf_counter() - began], dtype=torch.float64, device=device)
        seconds = float(_sum_of_two(own, peer, device)) / 2
        best, spent = min(best, seconds), spent + seconds
        if spent > 3 * _LONG_EXCHANGE_SECONDS:
            break
    return best


def _sum_of_two(x: torch.Tensor, peer: int, device: torch.device) -> torch.Tensor:
    """What an all-reduce of two ranks is: each sends all it has, and adds. Needs no process group for each pair."""
    received = torch.empty_like(x)
    sent = [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(sent):
        work.wait()
    total = x + received
    _wait(device)
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

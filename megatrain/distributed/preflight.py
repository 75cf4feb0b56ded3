"""Before the first step: are all ranks alike, and is none, its disk, or a link between two slower than the rest?

All ranks measure the same. One all-reduce of the extremes tells whether there is anything to look at; only then do they
measure again, so that what was busy for a moment is forgiven, and tell each other all figures, which name the culprit.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from megatrain import __version__
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.distributed.health_checks import CLOCK_SECONDS, SLOW_RANK, Effort, Finding, Reading, is_slow, judge
from megatrain.distributed.probe import arithmetic_seconds, next_link, write_seconds
from megatrain.units import format_bytes

_PACKAGES = ("torch", "deepspeed", "numpy")
_NUM_TRIES = 4
"""At most so often is measured, and the best counts."""
LEAST_FREE_BYTES = 256 << 20
_LEAST_FREE_MEMORY = {"cuda": 0.8, "cpu": 0.05}
"""Share that nobody uses: of a GPU, which is all ours, and of a machine's memory."""

AT_EVERY_START = Effort(written_bytes=1 << 20, sent_bytes=1 << 20, arithmetic_share=0.2)


class Places(NamedTuple):
    """Where a rank writes. ``run_dir``: on storage that all nodes share; ``scratch``: on the node's own disk.

    ``least_free_bytes``: that the run folder should have.
    """

    run_dir: Path
    scratch: Path
    least_free_bytes: int = LEAST_FREE_BYTES


def examine(groups: Groups, rank: RankInfo, places: Places, effort: Effort = AT_EVERY_START) -> list[Finding]:
    """What is bad, the same on all ranks. Collective; its time does not grow with the ranks where all is well."""
    reading, is_suspicious = take_reading(groups, rank, places, effort)
    return judge(groups.all_gather_object(reading), effort) if is_suspicious else []


def take_reading(groups: Groups, rank: RankInfo, places: Places, effort: Effort) -> tuple[Reading, bool]:
    """This rank's reading, of several the best, and whether any rank's looks bad. Collective."""
    best: Reading | None = None
    for _ in range(_NUM_TRIES):
        reading = _measure(groups, rank, places, effort)
        best = _best(best, reading) if best else reading
        if not _look_suspicious(_extremes(groups, best), effort):
            return best, False
    assert best is not None
    return best, True


def _measure(groups: Groups, rank: RankInfo, places: Places, effort: Effort) -> Reading:
    host, device = socket.gethostname(), groups.device
    troubles: list[str] = []
    seconds: dict[str, float] = {}
    with _marker(groups, places.run_dir) as marker:
        if rank.local_rank == 0:
            troubles += _no_space(places)
            if not marker.exists():
                troubles.append(f"{places.run_dir} is not the folder that rank 0 sees: put it on shared storage")
            try:
                seconds["write"] = write_seconds(places.run_dir, effort.written_bytes)
            except OSError as error:
                troubles.append(f"{places.run_dir} cannot be written: {error.strerror}")
        if (share := _free_memory(device)) < _LEAST_FREE_MEMORY.get(device.type, 0.0):
            troubles.append(f"only {share:.0%} of the memory is free: another process holds it")
        groups.barrier()
        clock = time.time()
    share_cores = device.type == "cpu" and rank.local_world_size > (os.cpu_count() or 1)
    if not share_cores:  # those that do differ by chance
        seconds["arithmetic"] = arithmetic_seconds(device, effort.arithmetic_share)
    name = zlib.crc32(host.encode())
    link = next_link(rank.rank, rank.world_size, name, effort.sent_bytes, device)
    if link is not None:
        seconds |= {"latency": link.latency_seconds, "exchange": link.exchange_seconds}
    software = {"Python": platform.python_version(), "megatrain": __version__}
    software |= {package: version(package) for package in _PACKAGES}
    is_far = link is not None and link.peer != name
    return Reading(rank.rank, host, software, _device_name(device), tuple(troubles), clock, seconds, is_far)


@contextlib.contextmanager
def _marker(groups: Groups, run_dir: Path) -> Iterator[Path]:
    """A file that rank 0 makes in the run folder for the others to see. Collective."""
    path = run_dir / ".preflight"
    if groups.rank == 0:
        with contextlib.suppress(OSError):  # that it cannot be written is told elsewhere
            path.touch()
    groups.barrier()
    try:
        yield path
    finally:
        if groups.rank == 0:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _no_space(places: Places) -> Iterator[str]:
    for folder, least in ((places.run_dir, places.least_free_bytes), (places.scratch, LEAST_FREE_BYTES)):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            if free < least:
                yield f"{folder} has {format_bytes(free)} left, less than {format_bytes(least)}"


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / total
    memory = psutil.virtual_memory()
    return float(memory.available / memory.total)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {format_bytes(properties.total_memory)}"
    return platform.machine()


def _best(one: Reading, other: Reading) -> Reading:
    seconds = {name: min(value, one.seconds.get(name, math.inf)) for name, value in other.seconds.items()}
    return replace(other, seconds=seconds)


def _extremes(groups: Groups, reading: Reading) -> dict[str, tuple[float, float]]:
    """The least and the greatest of each figure over all ranks. Collective: one all-reduce of a fixed size."""
    seconds, far = reading.seconds, ("far " if reading.is_far else "near ")
    figures = {
        "software": float(zlib.crc32(repr(sorted(reading.software.items())).encode())),
        "device": float(zlib.crc32(reading.device.encode())),
        "troubles": float(len(reading.troubles)),
        "clock": reading.clock,
        "arithmetic": seconds.get("arithmetic", math.nan),
        "write": seconds.get("write", math.nan),
    }
    for kind in ("near ", "far "):
        for name in ("latency", "exchange"):
            figures[kind + name] = seconds.get(name, math.nan) if kind == far else math.nan
    known = [(value, -value) if value == value else (-math.inf, -math.inf) for value in figures.values()]
    most = groups.all_reduce_max([high for high, _ in known] + [low for _, low in known])
    highs, lows = most[: len(known)], [-value for value in most[len(known) :]]
    return {name: (low, high) for name, low, high in zip(figures, lows, highs, strict=True) if high > -math.inf}


def _look_suspicious(extremes: Mapping[str, tuple[float, float]], effort: Effort) -> bool:
    """Whether `judge` may find anything: the least stands for the median, which is no less."""
    slow = effort.slow
    differ = any(extremes[name][0] != extremes[name][1] for name in ("software", "device"))
    (earliest, latest), (least, most) = extremes["clock"], extremes.get("arithmetic", (0.0, 0.0))
    return (
        differ
        or extremes["troubles"][1] > 0
        or latest - earliest > CLOCK_SECONDS
        or most > SLOW_RANK * least
        or any(
            is_slow(high, low, slow[name.split()[-1]], name.startswith("near "))
            for name, (low, high) in extremes.items()
            if name.split()[-1] in slow
        )
    )

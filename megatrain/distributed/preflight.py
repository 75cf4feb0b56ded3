"""Before the first step: are all ranks alike, and is none, its disk, or a link between two slower than the rest?

All ranks measure the same, tell each other all figures (under 1 KiB a rank), and come to the same findings. Where there
are any, they measure again, so that what was busy for a moment is forgiven.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.distributed.health_checks import Effort, Finding, Reading, diagnose
from megatrain.distributed.probe import arithmetic_seconds, next_link, write_seconds
from megatrain.units import format_bytes
from megatrain.version import __version__

_PACKAGES = ("torch", "deepspeed", "numpy")
_NUM_TRIES = 4
"""At most so often is measured, and the best counts."""
LEAST_FREE_BYTES = 256 << 20
_LEAST_FREE_MEMORY = {"cuda": 0.8, "cpu": 0.05}
"""Share that nobody uses: of a GPU, which is all ours, and of a machine's memory."""

AT_EVERY_START = Effort(written_bytes=1 << 20, sent_bytes=1 << 20, arithmetic_share=0.2)


class Folders(NamedTuple):
    """That a rank writes into. ``run_dir``: on storage that all nodes share; ``scratch``: on the node's own disk.

    ``least_free_bytes``: that the run folder should have.
    """

    run_dir: Path
    scratch: Path
    least_free_bytes: int = LEAST_FREE_BYTES


def examine(
    groups: Groups, rank: RankInfo, folders: Folders, effort: Effort = AT_EVERY_START
) -> tuple[list[Finding], list[Reading]]:
    """What is bad, and what each rank has measured, of several tries the best; the same on all ranks. Collective."""
    best: Reading | None = None
    for _ in range(_NUM_TRIES):
        reading = _measure(groups, rank, folders, effort)
        best = _best(best, reading) if best else reading
        readings = groups.all_gather_object(best)
        findings = diagnose(readings, effort)
        if not findings:
            break
    return findings, readings


def _measure(groups: Groups, rank: RankInfo, folders: Folders, effort: Effort) -> Reading:
    host, device = socket.gethostname(), groups.device
    problems: list[str] = []
    seconds: dict[str, float] = {}
    with _marker(groups, folders.run_dir) as marker:
        if rank.local_rank == 0:
            problems += _no_space(folders)
            if not marker.exists():
                problems.append(f"{folders.run_dir} is not the folder that rank 0 sees: put it on shared storage")
            try:
                seconds["write"] = write_seconds(folders.run_dir, effort.written_bytes)
            except OSError as error:
                problems.append(f"{folders.run_dir} cannot be written: {error.strerror}")
        if (share := _free_memory(device)) < _LEAST_FREE_MEMORY.get(device.type, 0.0):
            problems.append(f"only {share:.0%} of the memory is free: another process holds it")
        groups.barrier()
        clock = time.time()
    share_cores = device.type == "cpu" and rank.local_world_size > (os.cpu_count() or 1)
    if not share_cores:  # those that do differ by chance
        seconds["arithmetic"] = arithmetic_seconds(device, effort.arithmetic_share)
    if (link := next_link(rank.rank, rank.world_size, effort.sent_bytes, device)) is not None:
        seconds |= {"latency": link.latency_seconds, "exchange": link.exchange_seconds}
    software = {"Python": platform.python_version(), "megatrain": __version__}
    software |= {package: version(package) for package in _PACKAGES}
    return Reading(rank.rank, host, software, _device_name(device), tuple(problems), clock, seconds)


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


def _no_space(folders: Folders) -> Iterator[str]:
    for folder, least in ((folders.run_dir, folders.least_free_bytes), (folders.scratch, LEAST_FREE_BYTES)):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            if free < least:
                yield f"{folder} has {format_bytes(free)} left, less than {format_bytes(least)}"


def existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


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

"""Where torch's compiler keeps what it makes: on the node's own disk, in a folder of each user and local rank.

By itself Triton writes into the home folder, which all nodes share, and thousands of ranks would compile there. Each
rank of a node has a folder: what one has timed is not another's, and none waits for another's locks.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from megatrain.config import RunConfig
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.errors import ConfigError
from megatrain.parallel.compile import CACHE_DIR, is_compiled
from megatrain.units import format_bytes

logger = logging.getLogger(__name__)

_TRITON_CACHE_DIR = "TRITON_CACHE_DIR"
LEAST_FREE_BYTES = 64 << 20
_SHARED = {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs"}
"""Kinds of file systems that nodes share."""


class CompiledGraphs(NamedTuple):
    """How many graphs this process has compiled, and how many of them came from the cache."""

    num: int
    num_cached: int

    @property
    def text(self) -> str:
        return f"{self.num} graphs, {self.num_cached} of them from {os.environ[CACHE_DIR]}"


def compiled_graphs() -> CompiledGraphs:
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    hits = found["fxgraph_cache_hit"]
    return CompiledGraphs(hits + found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"], hits)


def settle_compile(config: RunConfig, rank: RankInfo, groups: Groups) -> RunConfig:
    """The config with ``train.compile: off`` where auto would compile and a rank has no folder to compile into; else
    each rank compiles into its own. Collective. Raises ConfigError where it is on.
    """
    if not is_compiled(config, groups.device):
        return config
    problem = groups.first_value(use_cache(rank.local_rank))
    if problem is None:
        return config
    advice = f"Set {CACHE_DIR} to a folder on the node's own disk"
    if config.train.compile == "on":
        raise ConfigError(f"train.compile is on, but nothing can be compiled: {problem}. {advice}, or set it to off.")
    if rank.rank == 0:
        logger.warning("layers are not compiled, and training is slower: %s. %s.", problem, advice)
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": "off"})})


def use_cache(local_rank: int) -> str | None:
    """Let this process compile into the first of its possible folders that can be used; why not, where none can."""
    name, problems = f"rank-{local_rank}", []
    for base in _bases(name):
        folder = base / name
        if (problem := _why_unusable(folder)) is not None:
            problems.append(f"{folder} {problem}")
            continue
        os.environ[CACHE_DIR] = str(folder)
        os.environ.setdefault(_TRITON_CACHE_DIR, str(folder / "triton"))
        if (kind := shared_file_system(folder, _mounts())) is not None and local_rank == 0:
            logger.warning("%s is on a %s file system, which is slow to compile into from many ranks", base, kind)
        return None
    return "; ".join(problems)


def shared_file_system(folder: Path, mounts: Iterable[tuple[str, str]]) -> str | None:
    """The kind of the file system that a folder is on, such as nfs4, where other nodes share it. ``mounts``: each mount
    point with its kind."""
    above = {str(path) for path in (folder, *folder.parents)}
    _, kind = max(((len(point), kind) for point, kind in mounts if point in above), default=(0, ""))
    return kind if kind in _SHARED else None


def _bases(name: str) -> Iterator[Path]:
    """Where the user says, or else the folders for temporary files, those that nodes do not share first."""
    if given := os.environ.get(CACHE_DIR):
        base = Path(given).absolute()
        yield base.parent if base.name == name else base  # set by an earlier run of this process
        return
    mounts = _mounts()
    folders = dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"])
    places = [Path(folder) / f"megatrain-compiled-{os.getuid()}" for folder in folders]
    yield from sorted(places, key=lambda place: shared_file_system(place, mounts) is not None)


def _why_unusable(folder: Path) -> str | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return "belongs to another user, whose code would be run"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    if free < LEAST_FREE_BYTES:
        return f"has {format_bytes(free)} left, less than {format_bytes(LEAST_FREE_BYTES)}"
    return None


def _mounts() -> list[tuple[str, str]]:
    return [(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)]

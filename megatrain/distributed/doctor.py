"""What `megatrain-launch doctor` starts once a rank: examines all ranks, and prints for its launcher what is bad.

python -m megatrain.distributed.doctor FOLDER --hosts node1:8,node2:8
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
import time
from pathlib import Path

import orjson
import torch

from megatrain.distributed.binding import bind
from megatrain.distributed.bootstrap import RankInfo, export_rank, extensions_dir, read_rank
from megatrain.distributed.causes import explain, last_words
from megatrain.distributed.device import local_device
from megatrain.distributed.groups import make_groups
from megatrain.distributed.health_checks import RESULT, STARTED, Effort, Finding, Reading
from megatrain.distributed.local_ranks import process_began
from megatrain.distributed.naming import name_ranks
from megatrain.distributed.preflight import Folders, examine, existing
from megatrain.distributed.rendezvous import RanksMissing, RanksUnfit, init_process_group
from megatrain.distributed.topology import Topology
from megatrain.errors import EXIT_OK, EXIT_RANK, MegatrainError, RankError

EFFORT = Effort(written_bytes=32 << 20, sent_bytes=16 << 20)
_WAIT_SECONDS = 25.0
"""For a link that is silent; and for ranks that do not come, where all start at once: together under a minute."""
_WAIT_FOR_A_RANK_SECONDS = 0.01
_NUM_IMPORTS = 2.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hosts", default="")
    parser.add_argument("--scratch", type=Path, default=extensions_dir())
    options = parser.parse_args(arguments)
    rank = read_rank()
    bind(rank)
    export_rank(rank)
    patience = patience_seconds(rank.world_size, time.time() - process_began())
    if rank.local_rank == 0:
        sys.stdout.write(f"{STARTED}{patience:.0f}\n")
        sys.stdout.flush()
    try:
        findings, readings = _examine(rank, options.folder, options.scratch, patience)
    except RanksMissing as error:
        findings, readings = _name_missing(error, options.hosts, patience), []
    except RanksUnfit as error:
        findings, readings = [Finding(str(error), error.hosts)], []
    except MegatrainError as error:
        findings, readings = [Finding(str(error), ())], []
    if rank.rank == 0:
        result = {"findings": list(map(list, findings)), "readings": list(map(dataclasses.asdict, readings))}
        sys.stdout.write(f"{RESULT}{orjson.dumps(result).decode()}\n")
        sys.stdout.flush()
    return EXIT_RANK if findings else EXIT_OK


def patience_seconds(num_ranks: int, start_seconds: float) -> float:
    """How long a rank that took so long to start, imports included, waits for the others.

    They read the same files, from the same storage, which serves one after the other.
    """
    return _WAIT_SECONDS + _WAIT_FOR_A_RANK_SECONDS * num_ranks + _NUM_IMPORTS * start_seconds


def _examine(rank: RankInfo, folder: Path, scratch: Path, patience: float) -> tuple[list[Finding], list[Reading]]:
    device = local_device(rank.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as many as each rank has a core for, however the ranks are laid out
    init_process_group(rank, patience, _WAIT_SECONDS)
    groups = make_groups(Topology.of(rank.world_size, 1, 1), rank.rank, device, _WAIT_SECONDS)
    try:
        return examine(groups, rank, Folders(folder, existing(scratch)), EFFORT)
    except RuntimeError as error:
        who = f"rank {rank.rank} on {socket.gethostname()}"
        _, text = explain(error, who) or (EXIT_RANK, f"{who}: {last_words(error)}")
        raise RankError(text) from None


def _name_missing(error: RanksMissing, hosts: str, patience: float) -> list[Finding]:
    """``hosts``: name and number of ranks of each, in the order of ranks."""
    pairs = [pair.rpartition(":") for pair in hosts.split(",") if pair]
    host_of = [name for name, _, count in pairs for _ in range(int(count))]
    missing = [(rank, host_of[rank] if rank < len(host_of) else "an unknown node") for rank in error.ranks]
    text = f"{name_ranks(missing)} did not come within {patience:.0f} s"
    return [Finding(text, tuple(dict.fromkeys(host for _, host in missing)))]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # a process group whose ranks no longer answer cannot be taken down

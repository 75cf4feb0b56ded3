"""One rank of very many for benchmarks/startup.py: the real start, up to the first step, over torch's fake group.

Nothing is sent; each collective ends at once, its output as it was. What is measured is what a rank does by itself, and
how many collectives it takes part in, over how many ranks: what the others do is the same.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what counts the collectives would import it, in the middle of what is measured
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.config import load
from megatrain.distributed.bootstrap import RankInfo, export_rank, free_port
from megatrain.train.assemble import assemble
from megatrain.train.checkpointing import restore
from megatrain.train.start_clock import StartClock


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives by the number of ranks that take part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_ranks: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            self.by_ranks[group.size()] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Rank 0 of ``world_size`` starts ``config``; prints what it took as JSON."""
    config_file, world_size = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank = RankInfo(
        rank=0,
        world_size=int(world_size),
        local_rank=0,
        local_world_size=8,
        launcher="none",
        master_addr="127.0.0.1",
        master_port=free_port(),
    )
    export_rank(rank)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=rank.world_size)
    config = load(Path(config_file))
    clock, collectives = StartClock(), Collectives()
    clock.parts.clear()  # Python and torch were there before
    began = time.process_time()
    with collectives:
        restore(assemble(config, rank, clock))
        clock.lap("restore")
    seconds = time.process_time() - began
    print(json.dumps({"parts": clock.parts, "cpu seconds": seconds, "collectives": collectives.by_ranks}))


if __name__ == "__main__":
    main()

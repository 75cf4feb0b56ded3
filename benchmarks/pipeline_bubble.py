"""How long do pipeline ranks wait for one another? Stages that sleep, so that the machine's speed does not matter.

A forward pass of a micro-batch through all chunks of a rank sleeps for a third of `--seconds`, a backward pass for two
thirds. The bubble is what a step takes beyond what rank 0 slept, in relation to that: by the formula (p - 1) / (v m)
for p ranks, v chunks a rank, m micro-batches.

    python benchmarks/pipeline_bubble.py [--ranks 2 4] [--chunks 1 2 4] [--micro-batches 8] [--seconds 0.6] [--turns 3]

Prints the least of the turns: what other work on the machine adds is no bubble.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is on the path, not the one above

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import spawn

from megatrain.distributed.bootstrap import free_port
from megatrain.parallel.pipeline import Field, Pipeline, Record
from megatrain.plan.pipeline_schedule import bubble

FIELDS = {"hidden": Field((4,), torch.float32)}


class Sleep(torch.autograd.Function):
    """Sleeps in both passes, and says how long it was: longer than asked for where the machine is busy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, slept: list[float]) -> Tensor:
        ctx.seconds, ctx.slept = seconds, slept
        slept.append(sleep(seconds / 3))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.slept.append(sleep(2 * ctx.seconds / 3))
        return gradient, None, None


def sleep(seconds: float) -> float:
    """How long it was."""
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


def run_rank(rank: int, num_ranks: int, port: int, arguments: argparse.Namespace, results: SimpleQueue[Any]) -> None:
    """Rank 0 tells of each number of chunks the bubble of each step."""
    slept: list[float] = []
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    assert dist.group.WORLD is not None
    for num_chunks in arguments.chunks:
        seconds = arguments.seconds / num_chunks

        def forward(chunk: int, record: Record | None, micro_batch: int) -> Record | Tensor:
            x = torch.zeros(4, requires_grad=True) if record is None else record["hidden"]
            y = Sleep.apply(x, seconds, slept)  # type: ignore[no-untyped-call]  # noqa: B023 - called in this turn only
            is_last = rank == num_ranks - 1 and chunk == num_chunks - 1  # noqa: B023
            return y.sum() if is_last else {"hidden": y}

        def backward(chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
            torch.autograd.backward(scalar)

        pipeline: Pipeline[int] = Pipeline(
            dist.group.WORLD, num_chunks, torch.device("cpu"), lambda *_: FIELDS, forward, backward
        )
        for _ in range(arguments.turns):
            slept.clear()
            dist.barrier()
            began = time.perf_counter()
            pipeline.train(range(arguments.micro_batches))
            dist.barrier()
            if rank == 0:
                results.put((num_chunks, (time.perf_counter() - began) / sum(slept) - 1))
    dist.destroy_process_group()


def measure(num_ranks: int, arguments: argparse.Namespace) -> dict[int, list[float]]:
    """By the number of chunks, the bubble of each step."""
    results: SimpleQueue[Any] = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(run_rank, (num_ranks, free_port(), arguments, results), nprocs=num_ranks)  # type: ignore[no-untyped-call]
    bubbles: dict[int, list[float]] = {}
    while not results.empty():
        num_chunks, of_step = results.get()
        bubbles.setdefault(num_chunks, []).append(of_step)
    return bubbles


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.6, help="of one micro-batch on one rank, both passes")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args(argv)
    print("ranks chunks micro-batches: bubble, by the formula, more than that")
    for num_ranks in arguments.ranks:
        for num_chunks, bubbles in measure(num_ranks, arguments).items():
            measured = min(bubbles)
            formula = bubble(num_ranks, num_chunks, arguments.micro_batches)
            print(
                f"{num_ranks} {num_chunks} {arguments.micro_batches}: "
                f"{measured:.3f} {formula:.3f} {measured - formula:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

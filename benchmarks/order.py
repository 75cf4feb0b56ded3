"""What does the k-th sample of a run cost, beside a table that holds the whole order?

The order of a corpus of 10^12 tokens is computed at random steps: whole global batches, single samples, and the same in
an epoch whose samples were cut shorter half-way. The table is what other loaders build: `numpy.random.permutation` of
the samples, here of 1/50 of them, for all take 4 GB; what it costs to build is left out.

    python benchmarks/order.py [--samples 500000000] [--batch 1024] [--turns 200]

Prints CPU microseconds a sample, and the ratio to a look-up in the table.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatrain.data.order import DataOrder, SamplingSettings


def cpu_microseconds(work: Callable[[], object], turns: int) -> float:
    work()
    began = time.process_time()
    for _ in range(turns):
        work()
    return (time.process_time() - began) / turns * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500_000_000, help="of 2,048 tokens, in two datasets")
    parser.add_argument("--batch", type=int, default=1024, help="samples of a global batch")
    parser.add_argument("--turns", type=int, default=200, help="look-ups of each kind")
    given = parser.parse_args()
    large = given.samples * 4 // 5
    settings = SamplingSettings(given.batch, (3.0, 1.0), 2048, (large, given.samples - large))
    order = DataOrder.begin(1, settings)
    half = given.samples // given.batch // 2
    shorter = replace(settings, seq_len=1024, num_samples=tuple(2 * count for count in settings.num_samples))
    cut = order.change(half, shorter)
    table = np.random.default_rng(1).permutation(given.samples // 50)
    draw = random.Random(1)
    look_up = cpu_microseconds(
        lambda: table[np.arange(given.batch) + draw.randrange(len(table) - given.batch)], given.turns
    )
    table_sample = look_up / given.batch
    print(f"table of 1/50 of the samples, a batch of {given.batch}: {table_sample:.3f} us a sample")
    cases = {
        "any step": lambda: order.batch(draw.randrange(10**7)),
        "an epoch cut at its half": lambda: cut.batch(half + draw.randrange(half // 2)),
    }
    for name, batch in cases.items():
        each = cpu_microseconds(batch, given.turns) / given.batch
        print(f"{name}, a batch of {given.batch}: {each:.3f} us a sample, {each / table_sample:.1f} times the table's")
    alone = cpu_microseconds(lambda: order.batch(draw.randrange(10**7), 5, 6), given.turns)
    print(f"any step, one sample by itself: {alone:.0f} us")


if __name__ == "__main__":
    main()

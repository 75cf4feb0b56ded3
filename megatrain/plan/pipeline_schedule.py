"""What each pipeline rank does in a step, in order: forward and backward passes, and exchanges with its neighbors.

A rank has v chunks of consecutive layers; chunk c of rank r is virtual stage c * p + r of p * v. A schedule is data: it
is made before the first pass, by pure functions, and `megatrain.parallel.pipeline` plays it.

One chunk a rank: 1F1B. Several: interleaved 1F1B. Both as in Narayanan et al. 2021 (arXiv:2104.04473), here for any
number of micro-batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias


class Pass(NamedTuple):
    """The forward or backward pass of a micro-batch through a virtual stage. Also names the message with its result."""

    kind: Literal["forward", "backward"]
    stage: int
    micro_batch: int


class Exchange(NamedTuple):
    """Messages that start together: the results of passes, sent and received. Each pair of ranks has the same messages
    in the same exchanges on both sides."""

    sends: tuple[Pass, ...]
    receives: tuple[Pass, ...]


Action: TypeAlias = Pass | Exchange

_SECONDS = {"forward": 1, "backward": 2}  # in relation to each other: what the order of messages goes by


def training_schedule(num_ranks: int, num_chunks: int, num_micro_batches: int) -> list[list[Action]]:
    """The actions of each pipeline rank in a step."""
    shape = num_ranks, num_chunks, num_micro_batches
    return _with_exchanges([training_passes(*shape, rank) for rank in range(num_ranks)], num_ranks * num_chunks)


def evaluation_schedule(num_ranks: int, num_chunks: int, num_micro_batches: int) -> list[list[Action]]:
    """The actions of each pipeline rank where nothing is learned.

    A stream of micro-batches is played as one schedule of at most ``num_ranks`` after another: no rank waits between.
    """
    rounds = _rounds(num_ranks, num_micro_batches)
    passes = [list(_in_rounds("forward", num_ranks, num_chunks, rounds, rank)) for rank in range(num_ranks)]
    return _with_exchanges(passes, num_ranks * num_chunks)


def training_passes(num_ranks: int, num_chunks: int, num_micro_batches: int, rank: int) -> list[Pass]:
    """The passes of one rank in order: forward passes to warm up, then one forward, one backward, then the rest."""
    return _one_forward_one_backward(num_ranks, num_chunks, _rounds(num_ranks, num_micro_batches), rank)


def bubble(num_ranks: int, num_chunks: int, num_micro_batches: int) -> float:
    """The time that a rank waits in a step, in relation to its own passes, where all chunks take as long.

    (p - 1) / (v m) from p micro-batches on; with fewer, each way round the ranks but the last waits for p - m more.
    """
    rounds = (num_chunks - 1) * max(num_ranks - num_micro_batches, 0)
    return (rounds + num_ranks - 1) / (num_chunks * num_micro_batches)


def most_held(
    num_ranks: int, num_chunks: int, num_micro_batches: int, rank: int, chunk_bytes: Sequence[float]
) -> float:
    """The most that a rank holds at a time between forward and backward passes, of all its chunks.

    ``chunk_bytes``: what it holds of one micro-batch in each of its chunks.
    """
    if num_chunks == 1:
        return min(num_micro_batches, num_ranks - rank) * chunk_bytes[0]
    first_rounds = _rounds(num_ranks, num_micro_batches)[:4]  # the others are as these or smaller
    held = most = 0.0
    for each in _one_forward_one_backward(num_ranks, num_chunks, first_rounds, rank):
        held += chunk_bytes[each.stage // num_ranks] * (1 if each.kind == "forward" else -1)
        most = max(most, held)
    return most


def _rounds(num_ranks: int, num_micro_batches: int) -> list[range]:
    """A round of micro-batches goes through a chunk before the next chunk begins.

    It takes as many as there are ranks to keep all busy. What is left over is spread over the rounds, the first ones
    first: after a smaller round, a larger one would wait for itself.
    """
    num_rounds = max(num_micro_batches // num_ranks, 1)
    size, num_larger = divmod(num_micro_batches, num_rounds)
    starts = [k * size + min(k, num_larger) for k in range(num_rounds + 1)]
    return [range(*bounds) for bounds in pairwise(starts)]


def _one_forward_one_backward(num_ranks: int, num_chunks: int, rounds: Sequence[range], rank: int) -> list[Pass]:
    forward = list(_in_rounds("forward", num_ranks, num_chunks, rounds, rank))
    backward = list(_in_rounds("backward", num_ranks, num_chunks, rounds, rank))
    if num_chunks == 1:
        num_ahead = num_ranks - rank - 1
    else:  # a result comes back after the other chunks' rounds, and passes ranks that are one further ahead each
        num_ahead = (num_chunks - 1) * len(rounds[0]) + 2 * (num_ranks - rank - 1)
    num_ahead = min(num_ahead, len(forward))
    passes = forward[:num_ahead]
    for pair in zip(forward[num_ahead:], backward, strict=False):
        passes += pair
    return passes + backward[len(forward) - num_ahead :]


def _in_rounds(
    kind: Literal["forward", "backward"], num_ranks: int, num_chunks: int, rounds: Sequence[range], rank: int
) -> Iterator[Pass]:
    chunks = range(num_chunks) if kind == "forward" else range(num_chunks - 1, -1, -1)
    for micro_batches in rounds:
        for chunk in chunks:
            for micro_batch in micro_batches:
                yield Pass(kind, chunk * num_ranks + rank, micro_batch)


def source(each: Pass, num_stages: int) -> Pass | None:
    """The pass whose result this one begins with; None where a micro-batch enters."""
    if each.kind == "forward":
        return each._replace(stage=each.stage - 1) if each.stage else None
    return each._replace(stage=each.stage + 1) if each.stage < num_stages - 1 else each._replace(kind="forward")


def _with_exchanges(orders: Sequence[Sequence[Pass]], num_stages: int) -> list[list[Action]]:
    """Each rank's passes with their messages between.

    A result is on its way from the moment that its pass ends, if passes take as long as `_SECONDS` says, and is
    received in the same exchange on the other rank. If ranks are slower or faster than that, they wait for one another
    no differently: exchanges depend only on what came before them in this time, so that no two ranks wait for each
    other.
    """
    num_ranks = len(orders)
    ends = _end_times(orders, num_stages)
    sends: dict[tuple[int, int], list[Pass]] = defaultdict(list)  # by rank and time
    receives: dict[tuple[int, int], list[Pass]] = defaultdict(list)
    for each in sorted(ends, key=lambda each: (ends[each], each)):
        before = source(each, num_stages)
        if before is not None and (before.stage - each.stage) % num_ranks:
            sends[before.stage % num_ranks, ends[before]].append(before)
            receives[each.stage % num_ranks, ends[before]].append(before)
    times: list[set[int]] = [set() for _ in orders]  # of each rank's exchanges
    for rank, time in sends.keys() | receives.keys():
        times[rank].add(time)
    schedule = []
    for rank, order in enumerate(orders):
        # What ends at a time comes before the exchange of that time; a pass that goes on meanwhile comes after it.
        actions: list[tuple[int, int, Action]] = [(ends[each], 0, each) for each in order]
        for time in times[rank]:
            exchange = Exchange(tuple(sorted(sends[rank, time])), tuple(sorted(receives[rank, time])))
            actions.append((time, 1, exchange))
        schedule.append([action for _, _, action in sorted(actions, key=lambda entry: entry[:2])])
    return schedule


def _end_times(orders: Sequence[Sequence[Pass]], num_stages: int) -> dict[Pass, int]:
    """When each pass ends. Raises ValueError where ranks would wait for each other for ever."""
    ends: dict[Pass, int] = {}
    position, free = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                each = order[position[rank]]
                before = source(each, num_stages)
                if before is not None and before not in ends:
                    break
                begin = max(free[rank], ends[before] if before else 0)
                ends[each] = free[rank] = begin + _SECONDS[each.kind]
                position[rank] += 1
                moved = True
    if len(ends) < sum(map(len, orders)):
        raise ValueError("these passes wait for one another in a circle")
    return ends

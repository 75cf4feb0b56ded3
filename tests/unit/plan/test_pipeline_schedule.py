"""Schedules of pipelines, played without processes: every one for up to 8 ranks, 4 chunks, 32 micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from megatrain.plan.pipeline_schedule import (
    Action,
    Exchange,
    Pass,
    bubble,
    evaluation_schedule,
    most_held,
    training_passes,
    training_schedule,
)

SHAPES = [(p, v) for p in range(1, 9) for v in range(1, 5) if p > 1 or v == 1]
CASES = [
    pytest.param((p, v), id=f"p{p}-v{v}", marks=[pytest.mark.slow] if p > 4 and (p, v) != (8, 2) else [])
    for p, v in SHAPES
]
MICRO_BATCHES = range(1, 33)


def needed(each: Pass, num_stages: int) -> Pass | None:
    if each.kind == "forward":
        return Pass("forward", each.stage - 1, each.micro_batch) if each.stage > 0 else None
    if each.stage == num_stages - 1:
        return Pass("forward", each.stage, each.micro_batch)
    return Pass("backward", each.stage + 1, each.micro_batch)


def play(schedule: list[list[Action]], num_stages: int) -> None:
    """As on the strictest device: a rank makes one pass after another, and beside them one exchange after another.

    An exchange starts when the passes and exchanges before it are done, and is done as a whole when all ranks that it
    has to do with have started theirs.
    """
    p = len(schedule)
    passes = [[a for a in actions if isinstance(a, Pass)] for actions in schedule]
    exchanges = [
        [(sum(isinstance(b, Pass) for b in actions[:at]), a) for at, a in enumerate(actions) if isinstance(a, Exchange)]
        for actions in schedule
    ]
    passed, started, exchanged = [0] * p, [0] * p, [0] * p
    sent_in: dict[Pass, tuple[int, int]] = {}
    received_in: dict[tuple[int, Pass], int] = {}
    for rank in range(p):
        for k, (_, exchange) in enumerate(exchanges[rank]):
            sent_in.update(dict.fromkeys(exchange.sends, (rank, k)))
            received_in.update({(rank, message): k for message in exchange.receives})
    takers = {message: (rank, k) for (rank, message), k in received_in.items()}
    moved = True
    while moved:
        moved = False
        for rank in range(p):
            k = passed[rank]
            if k < len(passes[rank]):
                before = needed(passes[rank][k], num_stages)
                arrives = -1 if before is None else received_in.get((rank, before), -1)
                if arrives < exchanged[rank]:
                    passed[rank], moved = k + 1, True
            k = started[rank]
            if k == exchanged[rank] and k < len(exchanges[rank]) and exchanges[rank][k][0] <= passed[rank]:
                started[rank], moved = k + 1, True
            k = exchanged[rank]
            if k < started[rank]:
                exchange = exchanges[rank][k][1]
                others = [takers[m] for m in exchange.sends] + [sent_in[m] for m in exchange.receives]
                if all(started[other] > at for other, at in others):
                    exchanged[rank], moved = k + 1, True
    for rank in range(p):
        assert passed[rank] == len(passes[rank]) and exchanged[rank] == len(exchanges[rank]), "a deadlock"


def check_messages(schedule: list[list[Action]], num_stages: int) -> int:
    """Every pass has what it needs, every message is sent once, in the same exchange on both sides; the most messages
    that have been received and not used yet."""
    p, most = len(schedule), 0
    between: dict[tuple[int, int], list[tuple[tuple[Pass, ...], tuple[Pass, ...]]]] = {}
    for rank, actions in enumerate(schedule):
        done: set[Pass] = set()
        waiting: set[Pass] = set()
        for action in actions:
            if isinstance(action, Pass):
                assert action.stage % p == rank and action not in done
                before = needed(action, num_stages)
                if before is not None and before.stage % p == rank:
                    assert before in done
                elif before is not None:
                    waiting.remove(before)
                if action.kind == "backward":
                    assert action._replace(kind="forward") in done
                done.add(action)
                continue
            assert set(action.sends) <= done and waiting.isdisjoint(action.receives)
            waiting |= set(action.receives)
            most = max(most, len(waiting))
            for other in range(p):
                out = tuple(m for m in action.sends if taker(m) % p == other)
                back = tuple(m for m in action.receives if m.stage % p == other)
                if out or back:
                    between.setdefault((rank, other), []).append((out, back))
        assert not waiting
    for (rank, other), batches in between.items():
        assert batches == [(out, back) for back, out in between[other, rank]]
    return most


def taker(message: Pass) -> int:
    return message.stage + (1 if message.kind == "forward" else -1)


def counted(schedule: list[list[Action]]) -> Iterator[list[Pass]]:
    for actions in schedule:
        yield [action for action in actions if isinstance(action, Pass)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("shape", CASES)
def test_every_training_schedule_runs_to_its_end(shape: tuple[int, int]) -> None:
    p, v = shape
    for m in MICRO_BATCHES:
        schedule = training_schedule(p, v, m)
        play(schedule, p * v)
        # From each side one on its way and one that has come. What a round has over the number of ranks comes early.
        surplus = -(-m // max(m // p, 1)) - p
        assert check_messages(schedule, p * v) <= (2 if v == 1 else 4 if surplus <= 0 else 5 + surplus)
        for rank, passes in enumerate(counted(schedule)):
            assert passes == training_passes(p, v, m, rank) and len(passes) == 2 * v * m
            held = list(itertools.accumulate(1 if each.kind == "forward" else -1 for each in passes))
            assert max(held) == most_held(p, v, m, rank, [1] * v) and held[-1] == 0


@pytest.mark.sample(5)
@pytest.mark.parametrize("shape", CASES)
def test_every_evaluation_schedule_runs_to_its_end(shape: tuple[int, int]) -> None:
    p, v = shape
    for m in range(1, p + 1):
        schedule = evaluation_schedule(p, v, m)
        assert check_messages(schedule, p * v) <= 1 and all(len(passes) == v * m for passes in counted(schedule))
        play(schedule, p * v)


def test_ranks_hold_what_1f1b_promises() -> None:
    assert [most_held(4, 1, 16, rank, [3.0]) for rank in range(4)] == [12, 9, 6, 3]
    assert [most_held(4, 1, 2, rank, [3.0]) for rank in range(4)] == [6, 6, 6, 3]
    assert [most_held(4, 2, 16, rank, [1.0, 1.0]) for rank in range(4)] == [11, 9, 7, 5]  # Megatron-LM's interleaving
    assert most_held(2, 2, 100_000, 0, [5.0, 2.0]) == most_held(2, 2, 16, 0, [5.0, 2.0])


def test_a_chunks_bytes_count_by_chunk() -> None:
    for p, v, m in itertools.product((2, 3, 4), (2, 3), MICRO_BATCHES):
        sizes = [7.0, 2.0, 4.0][:v]
        for rank in range(p):
            passes = training_passes(p, v, m, rank)
            held = itertools.accumulate(
                sizes[each.stage // p] * (1 if each.kind == "forward" else -1) for each in passes
            )
            assert max(held) == most_held(p, v, m, rank, sizes)


def test_the_bubble_is_that_of_the_schedule() -> None:
    for p, v in SHAPES:
        for m in MICRO_BATCHES:
            idle = longest(p, v, m) / (3 * v * m) - 1
            assert idle == pytest.approx(bubble(p, v, m)) and (m < p or idle == pytest.approx((p - 1) / (v * m)))


def longest(p: int, v: int, m: int) -> int:
    """The length of a step in which a forward pass takes 1 and a backward pass 2."""
    orders = [training_passes(p, v, m, rank) for rank in range(p)]
    ends: dict[Pass, int] = {}
    free, at = [0] * p, [0] * p
    while len(ends) < 2 * p * v * m:
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                each = order[at[rank]]
                before = needed(each, p * v)
                if before is not None and before not in ends:
                    break
                begins = max(free[rank], ends.get(before, 0) if before else 0)
                ends[each] = free[rank] = begins + (1 if each.kind == "forward" else 2)
                at[rank] += 1
    return max(ends.values())

"""A run that is killed again and again, at any moment, is the run that nobody disturbed; each time little is lost.

MEGATRAIN_ACCEPTANCE=1 kills a hundred times.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from megatrain.checkpoint.stores import find_store
from tests.runs import ACCEPTANCE, Metrics, TinyData, TrainProcess, last_step, tiny_config, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SEED = 7
NUM_KILLS = 100 if ACCEPTANCE else 4
SAVE_EVERY, EVALUATE_EVERY = 20, 15
# What a kill hits, and for how long that lasts: it comes at any moment of it.
MOMENTS = {"start": 6.0, "step": 2.0, "save": 0.02, "evaluation": 0.1}


class Kill(NamedTuple):
    """SIGKILL to one rank or all, ``num_steps`` steps or more into a start, so long after what is named has begun."""

    moment: str
    num_steps: int
    delay_seconds: float
    victims: tuple[int, ...]


def kills() -> Iterator[Kill]:
    """The same at each call; of each four kills one hits each moment."""
    chance = random.Random(SEED)
    for number in range(NUM_KILLS):
        if number % len(MOMENTS) == 0:
            moments = chance.sample(sorted(MOMENTS), len(MOMENTS))
        moment = moments.pop()
        delay = chance.uniform(0.0, MOMENTS[moment])
        yield Kill(moment, chance.randrange(3 * SAVE_EVERY), delay, chance.choice([(0,), (1,), (0, 1)]))


class KilledRun:
    """Two ranks that would train for very long, through `megatrain train`."""

    def __init__(self, data: TinyData, folder: Path) -> None:
        train = {"steps": 1_000_000, "eval_every_steps": EVALUATE_EVERY, "eval_batches": 16}
        config = tiny_config(data, folder / "run", train=train, checkpoint={"every_steps": SAVE_EVERY})
        self.config, self.run_dir = write_config(folder / "run.yaml", config), folder / "run"
        self.steps_lost: list[int] = []

    def start_and_kill(self, kill: Kill) -> None:
        """One start, to its end by this kill; what was lost must be little."""
        train, began = TrainProcess(self.config, 2), time.time()
        try:
            wait_until(lambda: bool(train.ranks()), 0.01)
            if kill.moment != "start":
                wait_until(lambda: train.process.poll() is not None or last_step(self.run_dir, began) is not None, 0.01)
                first = last_step(self.run_dir, began) or 0
                wait_until(lambda: (last_step(self.run_dir) or 0) >= first + kill.num_steps, 0.002)
            self._wait_for(kill.moment)
            time.sleep(kill.delay_seconds)
            self._send(train, kill.victims)
            code, output = train.wait()
            assert not train.ranks()
        finally:
            train.kill_all()
        assert code == 5, output
        assert "Traceback" not in output
        self._check_loss(last_step(self.run_dir) or 0)

    def finish(self) -> int:
        """One more start, asked to end once it steps; its last step."""
        train, began = TrainProcess(self.config, 2), time.time()
        try:
            wait_until(lambda: train.process.poll() is not None or last_step(self.run_dir, began) is not None)
            train.process.send_signal(signal.SIGUSR1)
            code, output = train.wait()
        finally:
            train.kill_all()
        assert code == 75, output
        return Metrics.read(self.run_dir).steps[-1]

    def _wait_for(self, moment: str) -> None:
        if moment == "save":
            wait_until(self._is_saving, 0.001)
        elif moment == "evaluation":
            wait_until(lambda: ((last_step(self.run_dir) or 0) + 1) % EVALUATE_EVERY == 0, 0.001)

    def _send(self, train: TrainProcess, victims: tuple[int, ...]) -> None:
        """To the victims; where not all are there yet, to those that are."""
        ranks = train.ranks()
        for rank in set(victims) & set(ranks) or set(ranks):
            try:
                ranks[rank].send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:  # the death of the other has ended it already
                continue

    def _check_loss(self, reached: int) -> None:
        """At most the steps since the last checkpoint, and those since a save that was under way had begun."""
        newest = max((checkpoint.step for checkpoint in find_store(self.run_dir).list() if checkpoint.good), default=0)
        self.steps_lost.append(max(reached - newest, 0))
        assert self.steps_lost[-1] <= SAVE_EVERY * (2 if self._is_saving() else 1)

    def _is_saving(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".generation-*/step-*"))


def test_repeated_kills_do_not_change_the_run(tiny_data: TinyData, tmp_path: Path) -> None:
    killed = KilledRun(tiny_data, tmp_path / "killed")
    for number, kill in enumerate(kills(), 1):
        try:
            killed.start_and_kill(kill)
        except AssertionError as error:
            raise AssertionError(
                f"kill {number} of seed {SEED}, {kill}, after {killed.steps_lost} lost: {error}"
            ) from error
        sys.stdout.write(f"kill {number} in a {kill.moment} took {killed.steps_lost[-1]} steps\n")
        sys.stdout.flush()
    num_steps = killed.finish()

    straight = KilledRun(tiny_data, tmp_path / "straight")
    code, output = TrainProcess(straight.config, 2, f"train.steps={num_steps}").wait()
    assert code == 0, output
    metrics, undisturbed = Metrics.read(killed.run_dir), Metrics.read(straight.run_dir)
    assert metrics.steps == undisturbed.steps == list(range(1, num_steps + 1))
    assert metrics.losses == undisturbed.losses
    assert metrics.norms == undisturbed.norms

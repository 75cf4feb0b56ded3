"""All time since a run's first start belongs to one part: training, saving, restarting, recomputing or waiting."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.observe.goodput import Goodput, GoodputLedger, last_goodput
from megatrain.observe.metrics import METRICS_FILE

WHOLE = st.integers(0, 50)
STEP = st.tuples(st.integers(1, 50), st.sampled_from([0, 0, 0, 7]))  # seconds of the step, seconds of a save after it
START = st.tuples(WHOLE, WHOLE, st.lists(STEP, max_size=12), WHOLE)  # queue, start-up, steps, dying


class Run:
    """A run on a clock of its own, which writes a line after every step and keeps the last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.time = folder, 1_700_000_000.0
        self.kept_steps, self.kept_seconds = 0, 0.0

    def now(self) -> float:
        return self.time

    def write(self, ledger: GoodputLedger) -> None:
        line = {"step": 1, "time": self.time, "goodput": ledger.figures._asdict()}
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, startup: float, steps: list[tuple[int, int]]) -> None:
        began = self.time
        self.time += startup
        ledger = GoodputLedger(self.folder, began, self.now)
        ledger.begin(self.kept_seconds)
        self.write(ledger)
        for seconds, saving in steps:
            self.time += seconds
            ledger.step(0.0)
            self.write(ledger)
            if saving:
                self.kept_seconds = ledger.training_seconds
                self.time += saving
                ledger.step(saving)
                self.write(ledger)


@given(st.lists(START, min_size=1, max_size=6))
def test_the_parts_are_all_the_time(starts):
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        began = run.time
        expected = dict.fromkeys(Goodput._fields, 0.0)
        since_save = gap = 0.0
        for number, (queue, startup, steps, dying) in enumerate(starts):
            if number:
                run.time += queue
                expected["waiting"] += gap + queue
                expected["recomputing"] += since_save
                expected["training"] -= since_save
            run.start(startup, steps)
            expected["restarting"] += startup
            since_save = 0.0
            for seconds, saving in steps:
                since_save = 0.0 if saving else since_save + seconds
                expected["training"] += seconds
                expected["saving"] += saving
            last_line, gap = run.time, dying
            run.time += dying
        found, _ = last_goodput(run.folder) or (None, None)
        assert found is not None
        assert found.wall_seconds == pytest.approx(last_line - began)
        assert found._asdict() == pytest.approx(expected, abs=1e-6)


def test_going_back_is_restarting_and_then_recomputing(tmp_path):
    run = Run(tmp_path)
    ledger = GoodputLedger(tmp_path, run.time, run.now)
    ledger.begin(0.0)
    run.time += 30
    ledger.step(0.0)
    run.time += 5  # half of a step, and the state of 10 seconds read again
    ledger.begin(10.0)
    assert ledger.figures == Goodput(training=10.0, restarting=5.0, recomputing=20.0)


def test_unwritten_metrics_are_no_waiting(tmp_path):
    run = Run(tmp_path)
    ledger = GoodputLedger(tmp_path, run.time, run.now)
    ledger.begin(0.0)
    run.write(ledger)
    run.time += 100  # steps, of which a full disk took no line; 90 seconds of them are in a checkpoint
    ledger = GoodputLedger(tmp_path, run.time, run.now)
    ledger.begin(90.0)
    assert ledger.figures == Goodput(training=90.0, waiting=10.0)


def test_the_step_under_way_counts_as_training(tmp_path):
    run = Run(tmp_path)
    ledger = GoodputLedger(tmp_path, run.time, run.now)
    ledger.begin(0.0)
    run.time += 3
    assert ledger.figures.training == 3.0
    assert ledger.training_seconds == 0.0


@pytest.mark.parametrize(
    "line", ["", '{"step": 1, "time": 1.0}', '{"step": 1, "time": 1.0, "goodput": {"training": 1}}']
)
def test_metrics_without_figures_tell_nothing(tmp_path, line):
    (tmp_path / METRICS_FILE).write_text(line + "\n")
    assert last_goodput(tmp_path) is None


def test_in_words():
    text = Goodput(training=3600 * 9, saving=360, restarting=360, recomputing=1440, waiting=1440).text()
    assert text == (
        "goodput 90.0% of 10h 00m since the first start (saving 1.0%, starting 1.0%, recomputing 4.0%, waiting 4.0%)"
    )

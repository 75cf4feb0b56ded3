"""What `make demo` says of the steps that it did twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.demo import Demo


@pytest.mark.parametrize(
    ("lost", "resumed", "twice"),
    [
        ({150: 5.1, 160: 5.0, 165: 4.9, 170: 4.8}, {165: 4.9, 170: 4.7}, {165: (4.9, 4.9), 170: (4.8, 4.7)}),
        ({160: 5.0, 162: 4.9, 165: 4.9}, {165: 4.9}, {165: (4.9, 4.9)}),
        ({160: 5.0, 162: 4.9}, {163: 4.9, 165: 4.9}, {}),
        ({}, {165: 4.9}, {}),
    ],
    ids=["the same steps", "a hole in the resumed run", "no step in common", "nothing was lost"],
)
def test_losses_that_both_runs_logged_are_compared(
    lost: dict[int, float], resumed: dict[int, float], twice: dict[int, tuple[float, float]], tmp_path: Path
) -> None:
    demo = Demo(tmp_path)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    lines = [{"event": "resume", "step": 160}, *({"step": step, "loss": loss} for step, loss in resumed.items())]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 166, "lo')
    assert demo.done_twice(lost) == twice

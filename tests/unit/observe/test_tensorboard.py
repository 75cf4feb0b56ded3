import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatrain.observe.tensorboard import TensorBoardWriter


def scalars(run_dir):
    """What TensorBoard itself reads: by tag, (step, figure)."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_every_figure(tmp_path, make_step):
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2):
        writer.step(make_step(step))
    writer.validation(2, 3.5, {"code": 3.0, "prose": 4.0}, perplexity=33.0)
    read = scalars(tmp_path)
    assert [step for step, _ in read["train/loss"]] == [1, 2]
    assert read["train/loss"][1][1] == pytest.approx(8.98)
    assert (read["validation/loss"], read["validation/perplexity"]) == ([(2, 3.5)], [(2, 33.0)])
    assert (read["validation_loss/code"], read["validation_loss/prose"]) == ([(2, 3.0)], [(2, 4.0)])
    assert read.keys() >= {
        "train/grad_norm",
        "train/learning_rate",
        "throughput/tokens_per_second",
        "throughput/mfu",
        "memory/peak_GiB",
        "step_parts/forward_backward_seconds",
    }
    writer.close()


def test_after_a_resume_tensorboard_shows_each_step_once(tmp_path, make_step):
    first = TensorBoardWriter(tmp_path)
    for step in range(1, 8):
        first.step(make_step(step, loss=1.0))
    first.close()
    second = TensorBoardWriter(tmp_path, resume_step=4)
    for step in range(5, 9):
        second.step(make_step(step, loss=2.0))
    second.close()
    assert scalars(tmp_path)["train/loss"] == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]


def test_unknown_and_infinite_figures_are_no_obstacle(tmp_path, make_step):
    writer = TensorBoardWriter(tmp_path)
    writer.step(make_step(1, mfu=None, loss=float("nan")))
    writer.validation(1, float("nan"))
    writer.validation(2, float("inf"))
    writer.close()
    read = scalars(tmp_path)
    assert "throughput/mfu" not in read
    assert [step for step, _ in read["train/loss"]] == [1]


def test_writing_needs_neither_torch_nor_tensorflow(tmp_path):
    script = (
        "import sys; from pathlib import Path; from megatrain.observe.tensorboard import TensorBoardWriter; "
        "TensorBoardWriter(Path(sys.argv[1])).close(); print({'torch', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

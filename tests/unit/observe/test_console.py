import io
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from megatrain.observe.append import AppendFile
from megatrain.observe.console import ProgressConsole
from megatrain.observe.metrics import read_lines
from megatrain.observe.observers import Observers

SCRIPT = """
import sys
from pathlib import Path
from megatrain.observe.metrics import StepMetrics
from megatrain.observe.observers import Observers
with Observers(Path(sys.argv[1]), num_steps=2000, tensorboard=False) as observers:
    observers.start({"model": "llama"})
    for step in range(1, 2001):
        observers.step(StepMetrics(step, step, 1.0, 1.0, 1e-3, 0.5, 2.0, None, 0, 1))
"""


def show(terminal: bool, make_step) -> str:
    out = io.StringIO()
    console = ProgressConsole(4, console=Console(file=out, force_terminal=terminal, width=120))
    console.start({"model": "llama, 27.1M parameters", "look at": "tensorboard --logdir runs/a[1]"})
    for step in range(1, 4):
        time.sleep(0.02)
        console.step(make_step(step))
    console.line("step 3 | saved runs/a[1]/checkpoints/step-00000003")
    console.close()
    return out.getvalue()


def test_without_a_terminal_a_step_is_one_line(make_step):
    lines = show(False, make_step).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert re.fullmatch(
        r"step 3/4 \| loss 8\.9700 \| 4\.10k tokens/s \| MFU 31\.0% \| grad norm 1\.500 \| lr 1\.00e-03 \| 0s left",
        lines[4],
    )
    assert lines[1] == "look at  tensorboard --logdir runs/a[1]"
    assert lines[5] == "step 3 | saved runs/a[1]/checkpoints/step-00000003"


def test_a_terminals_progress_line_leaves_others_whole(make_step):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", show(True, make_step))
    assert "3/4" in text
    assert "loss 8.9700 | 4.10k tokens/s | MFU 31.0% |" in text
    assert "step 3 | saved runs/a[1]/checkpoints/step-00000003\n" in text


def test_time_left_follows_the_pace_of_this_start(make_step):
    console = ProgressConsole(200, resume_step=100, console=Console(file=io.StringIO()))
    assert math.isnan(console.seconds_left())
    started = time.monotonic()
    for step in range(101, 111):
        time.sleep(0.01)
        console.step(make_step(step))
    pace = (time.monotonic() - started) / 10
    assert 0.8 * 90 * pace < console.seconds_left() < 1.2 * 90 * pace


def test_a_broken_stdout_does_not_end_the_run(tmp_path: Path):
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen([*command, tmp_path / "pipe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, tmp_path / "full"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    for run in ("pipe", "full"):
        assert len((tmp_path / run / "metrics.jsonl").read_bytes().splitlines()) == 2001


def test_observers_tell_every_place_of_each_step(tmp_path, make_step, capsys):
    with Observers(tmp_path, num_steps=4) as observers:
        observers.start({"model": "llama"})
        observers.step(make_step(1))
        observers.step(make_step(2))
    with Observers(tmp_path, num_steps=4, resume_step=1) as observers:
        observers.start({"model": "llama"})
        observers.step(make_step(2))
        observers.validation(2, 4.5, 1.0, {"code": 4.0, "prose": 5.0})
        observers.saved(2, tmp_path / "checkpoints", 0.5)
        observers.event("finish", 2, "finished")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count('"loss"') == 2
    assert '"event":"resume","step":1,"num_steps":4,"model":"llama","num_steps_redone":1' in text
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    shown = capsys.readouterr().out
    assert '"validation_loss":4.5,"validation_losses":{"code":4.0,"prose":5.0}' in text
    assert "step 2 | validation loss 4.5000 | code 4.0000 | prose 5.0000 (1s)" in shown
    assert shown.endswith("step 2 | finished\n")


def test_a_step_does_not_wait_for_the_disk(tmp_path, make_step, monkeypatch):
    answers, append = threading.Event(), AppendFile.append

    def slow_append(self, record):
        assert answers.wait(60)
        append(self, record)

    monkeypatch.setattr(AppendFile, "append", slow_append)
    with Observers(tmp_path, num_steps=3) as observers:
        observers.start({"model": "llama"})
        for step in (1, 2, 3):
            observers.step(make_step(step))
        assert b'"loss"' not in (tmp_path / "metrics.jsonl").read_bytes()
        answers.set()
        observers.flush()
        assert [line["step"] for line in read_lines(tmp_path, b'"loss"')] == [1, 2, 3]

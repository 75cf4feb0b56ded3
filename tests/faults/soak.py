"""One run that faults of every kind hit, again and again: nothing is lost, and all its time is accounted for.

`make soak` calls it, or `python -m tests.faults.soak --faults 44 --seconds 5 20`. Each fault comes so many seconds
after the run is stepping again. It ends with 0 if every fault ended as it should, the losses are those of a run that
nothing disturbed, to the last bit, and the parts of goodput are the time on the clock, to a hundredth.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from megatrain.checkpoint.stores import find_store
from megatrain.observe.goodput import Goodput, last_goodput
from tests.faults.small_disk import fill, small_disk
from tests.runs import Metrics, TinyData, TrainProcess, last_step, tiny_config, wait_until, write_config
from tests.tiny_data import make_tiny_data

DISK_BYTES = 8 << 20  # a dozen checkpoints
SAVE_EVERY = 10
HANG_TIMEOUT_SECONDS = 10.0
TRANSFORM = """
import gc, os, time
from pathlib import Path

import numpy as np
import torch

PACE, FLIP = Path("{folder}/pace"), Path("{folder}/flip")

def pass_through(tokens, random):
    if PACE.exists():  # so that minutes are not so many steps that repeating them takes minutes too
        time.sleep(0.1)
    if os.environ["RANK"] == "1" and FLIP.exists():
        FLIP.unlink()
        gc.unfreeze()  # what a run has frozen is not among the objects
        for found in gc.get_objects():
            if isinstance(found, torch.nn.Parameter) and found.ndim == 1:
                found.detach().numpy().view(np.int32)[:1] ^= 1 << 12
    return tokens
"""


class Fault(NamedTuple):
    """``inject``: what is done to a run that steps. ``code``: it ends with it, None if it goes on; ``says``: then.

    ``between``: what else is done before the next start, which says ``then_says``.
    """

    inject: Callable[[Soak], None]
    code: int | None
    says: str = ""
    between: Callable[[Soak], None] = lambda soak: None
    then_says: str = ""


class Soak:
    """Two ranks through `megatrain train`, in ``folder``. ``disk``: a small one for the checkpoints."""

    def __init__(self, data: TinyData, folder: Path, disk: Path | None, chance: random.Random) -> None:
        self.folder, self.disk, self.chance = folder, disk, chance
        self.run_dir = folder / "run"
        (folder / "soaking.py").write_text(TRANSFORM.format(folder=folder))
        self.extensions = folder / "extensions"
        self.config = self._write_config(data, "run", disk / "checkpoints" if disk else None)
        self._straight = self._write_config(data, "straight", None)
        (folder / "pace").touch()
        self.began = time.time()
        self.train = self._start(self.config)

    def suffer(self, fault: Fault) -> str:
        """One fault, until the run steps again; what there was of it, for a person."""
        before, began = last_step(self.run_dir), time.time()
        fault.inject(self)
        if fault.code is None:
            return f"step {before}; it goes on"
        code, output = self.train.wait()
        assert code == fault.code, f"code {code}, not {fault.code}: {output}"
        assert fault.says in output, output
        assert "Traceback" not in output, output
        wait_until(lambda: not self.train.ranks())
        ended = time.time()
        fault.between(self)
        self.train = self._start(self.config)
        self.wait_until_it_steps(ended)
        assert fault.then_says in self.train.output(), self.train.output()
        lines = Metrics.read(self.run_dir).events
        resumed = [line["step"] for line in lines if line["event"] == "resume"][-1]
        end = f"ended after {ended - began:.1f} s with {code}"
        return f"step {before}; {end}, stepped again {time.time() - ended:.1f} s later, from step {resumed} on"

    def wait_until_it_steps(self, since: float) -> None:
        """Until it has logged a step after ``since``."""
        wait_until(lambda: self.train.process.poll() is not None or last_step(self.run_dir, since) is not None)
        assert self.train.process.poll() is None, self.train.output()

    def finish(self) -> int:
        """Ask it to end; its last step."""
        self.train.process.send_signal(signal.SIGUSR1)
        code, output = self.train.wait()
        assert code == 75, output
        return Metrics.read(self.run_dir).steps[-1]

    def check_losses(self, num_steps: int) -> None:
        """Against a run of as many steps that nothing disturbs."""
        (self.folder / "pace").unlink()
        self.train = self._start(self._straight, f"train.steps={num_steps}")
        assert self.train.process.wait() == 0, self.train.output()
        disturbed, straight = Metrics.read(self.run_dir), Metrics.read(self.folder / "straight")
        assert disturbed.steps == straight.steps == list(range(1, num_steps + 1))
        assert disturbed.losses == straight.losses
        assert disturbed.norms == straight.norms

    def check_goodput(self) -> Goodput:
        """Its parts are the time from the first start to the last line."""
        goodput, _ = last_goodput(self.run_dir) or (None, None)
        assert goodput is not None
        seconds = Metrics.read(self.run_dir).events[-1]["time"] - self.began
        assert abs(goodput.wall_seconds - seconds) <= 0.01 * seconds, (goodput, seconds)
        return goodput

    def _write_config(self, data: TinyData, name: str, checkpoints: Path | None) -> Path:
        config = tiny_config(
            data,
            self.folder / name,
            parallel={"zero_stage": 0},  # all ranks hold all weights: one that differs is found
            train={"steps": 1_000_000, "hang_timeout_seconds": HANG_TIMEOUT_SECONDS, "eval_every_steps": 15},
            checkpoint={"every_steps": SAVE_EVERY, "dir": str(checkpoints) if checkpoints else None},
        )
        config["data"]["train"][0]["transform"] = "soaking:pass_through"
        return write_config(self.folder / f"{name}.yaml", config)

    def _start(self, config: Path, *overrides: str) -> TrainProcess:
        path = os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(self.extensions)}
        return TrainProcess(config, 2, *overrides, environment=environment)


def _signal_ranks(number: int, *ranks: int) -> Callable[[Soak], None]:
    """To these, or to one of the two."""

    def send(soak: Soak) -> None:
        there = soak.train.ranks()
        for rank in ranks or [soak.chance.randrange(2)]:
            there[rank].send_signal(number)

    return send


def _signal_command(number: int) -> Callable[[Soak], None]:
    return lambda soak: soak.train.process.send_signal(number)


def _flip_in_newest_checkpoint(soak: Soak) -> None:
    newest = [checkpoint for checkpoint in find_store(soak.run_dir).list() if checkpoint.good][-1]
    path = Path(str(newest.path)) / f"rank-{soak.chance.randrange(2):05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[soak.chance.randrange(len(content))] ^= 1 << soak.chance.randrange(8)
    path.write_bytes(content)


def _flip_in_a_weight(soak: Soak) -> None:
    (soak.folder / "flip").touch()


def _leave_a_build_lock(soak: Soak) -> None:
    lock = soak.extensions / "some_operator" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)


def _fill_the_disk(soak: Soak) -> None:
    assert soak.disk is not None

    def num_failed() -> int:
        return sum(event["event"] == "save failed" for event in Metrics.read(soak.run_dir).events)

    before, ballast = num_failed(), fill(soak.disk, but=100_000)
    wait_until(lambda: num_failed() > before)
    ballast.unlink()


KILLED = "killed, or crashed"
FULL_DISK = "the disk of the checkpoints was full"
FAULTS = {
    "one rank was killed": Fault(_signal_ranks(signal.SIGKILL), 5, KILLED),
    "all ranks were killed": Fault(_signal_ranks(signal.SIGKILL, 0, 1), 5, "Start the run again"),
    "the command was killed": Fault(_signal_command(signal.SIGKILL), -signal.SIGKILL),
    "the command got TERM": Fault(_signal_command(signal.SIGTERM), 75, "state saved"),
    "one rank got USR1": Fault(_signal_ranks(signal.SIGUSR1), 75, "state saved"),
    "one rank was stopped": Fault(_signal_ranks(signal.SIGSTOP), 5, "Nothing has moved for"),
    "a bit flipped in a weight": Fault(_flip_in_a_weight, 5, "weights differ that must be the same"),
    "a bit flipped in the newest checkpoint": Fault(
        _signal_ranks(signal.SIGKILL), 5, KILLED, _flip_in_newest_checkpoint, "passed over a damaged checkpoint"
    ),
    "a build was killed, and left its lock": Fault(
        _signal_ranks(signal.SIGKILL), 5, KILLED, _leave_a_build_lock, "a build that was killed had left it"
    ),
    FULL_DISK: Fault(_fill_the_disk, None),
}


def schedule(names: Sequence[str], num_faults: int, chance: random.Random) -> list[str]:
    """All kinds in turn, in an order by chance each time."""
    rounds = -(-num_faults // len(names))
    return [name for _ in range(rounds) for name in chance.sample(names, len(names))][:num_faults]


def soak(folder: Path, num_faults: int, seconds: tuple[float, float], seed: int, say: Callable[[str], object]) -> None:
    """The whole of it. Raises AssertionError where anything is not as it should be."""
    chance = random.Random(seed)
    with ExitStack() as held:
        try:
            disk = held.enter_context(small_disk(folder / "disk", DISK_BYTES))
        except pytest.skip.Exception as refused:
            say(f"without a full disk: {refused}")
            disk = None
        data = folder / "data"
        data.mkdir()
        run = Soak(make_tiny_data(data), folder, disk, chance)
        held.callback(lambda: run.train.kill_all())
        names = [name for name in FAULTS if name != FULL_DISK or disk is not None]
        run.wait_until_it_steps(run.began)
        for number, name in enumerate(schedule(names, num_faults, chance), 1):
            time.sleep(chance.uniform(*seconds))
            try:
                say(f"{number}/{num_faults} {name}: {run.suffer(FAULTS[name])}")
            except AssertionError as error:
                raise AssertionError(f"fault {number} of seed {seed}, {name}: {error}") from error
        time.sleep(min(seconds))
        num_steps = run.finish()
        goodput = run.check_goodput()
        say(f"{goodput.text()}; in seconds: {goodput}")
        run.check_losses(num_steps)
        say(f"{num_faults} faults, {num_steps} steps: nothing was lost, every loss and norm is the undisturbed run's")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=4 * len(FAULTS), help="how many (%(default)s: each kind 4 times)")
    parser.add_argument("--seconds", type=float, nargs=2, default=(5.0, 20.0), help="between them (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of their order and moments (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatrain-soak-") as folder:
        soak(Path(folder), given.faults, tuple(given.seconds), given.seed, _say)


def _say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

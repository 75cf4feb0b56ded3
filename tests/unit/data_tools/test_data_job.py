"""Stages of units on the executors of one machine, and the life of the folder that they write."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from clean_samples import silent

from data_tools import folder as folder_module
from data_tools import job
from data_tools.executors import Advance, LocalPool, Place, Share, Unfinished
from data_tools.folder import OutputFolder, coordinating
from data_tools.job import Effort, Records, Stage, one_unit, run_stages
from data_tools.origin import Origin
from megatrain.atomic import commit_bytes
from megatrain.errors import ConfigError, DataError, RankError

NUM_UNITS = 7


@dataclass(frozen=True)
class Units:
    """Each unit commits its number, and adds its name to a log."""

    folder: Path
    fails: int = -1

    def path(self, number: int) -> Path:
        return self.folder / "units" / str(number)

    def run(self, number: int, advance: Advance) -> None:
        if number == self.fails:
            os.kill(os.getpid(), 9)
        with (self.folder / "log").open("a") as log:
            log.write(f"{number}\n")
        commit_bytes(self.path(number), str(number).encode())
        advance(1)

    @property
    def stage(self) -> Stage:
        return Stage("count", [1] * NUM_UNITS, self.path, self.run)

    def stages(self) -> Iterator[Stage]:
        yield self.stage
        total = self.folder / "total"
        yield one_unit("add", total, lambda: commit_bytes(total, str(sum(range(NUM_UNITS))).encode()))


def logged(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "log").read_text().split()))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_committed_unit_never_runs_again(num_workers: int, tmp_path: Path) -> None:
    units = Units(tmp_path)
    (tmp_path / "units").mkdir()
    units.path(3).touch()
    assert run_stages(units.stages(), tmp_path, Effort(num_workers, silent))
    assert logged(tmp_path) == [0, 1, 2, 4, 5, 6]
    assert (tmp_path / "total").read_text() == "21"
    assert run_stages(units.stages(), tmp_path, Effort(num_workers, silent))
    assert len(logged(tmp_path)) == 6


def test_a_dead_worker_is_named_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_stages([Units(tmp_path, fails=2).stage], tmp_path, Effort(2, silent))
    assert run_stages(Units(tmp_path).stages(), tmp_path, Effort(2, silent))


def test_workers_that_die_idle_are_named_too(tmp_path: Path) -> None:
    with LocalPool(2) as pool:
        pool.submit(os.getpid).result()
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        with pytest.raises(RankError, match="SIGKILL"):
            while True:  # until the pool has noticed
                pool.submit(os.getpid)
                time.sleep(0.01)


@pytest.mark.parametrize("tasks", ["", "7.0"], ids=["given by hand", "of one array"])
def test_shares_cover_the_units_once(tasks: str, tmp_path: Path) -> None:
    units = Units(tmp_path)
    (tmp_path / "units").mkdir()
    units.path(5).touch()
    for index in (2, 0, 1):
        place = Place(LocalPool(1), Share(index, 3, tasks))
        assert not run_stages(units.stages(), tmp_path, Effort(1, silent, place=place))
    assert logged(tmp_path) == [0, 1, 2, 3, 4, 6]


def test_a_stage_alone_wants_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LOOK_AGAIN_SECONDS", 0.0)
    units = Units(tmp_path)
    with pytest.raises(Unfinished, match="7 of 7 units of the stage 'count'") as caught:
        run_stages(units.stages(), tmp_path, Effort(1, silent, stage="add"))
    assert caught.value.exit_code == 75
    assert not run_stages(units.stages(), tmp_path, Effort(1, silent, stage="count"))
    assert not (tmp_path / "total").exists()
    run_stages(units.stages(), tmp_path, Effort(1, silent, stage="add"))
    assert (tmp_path / "total").exists()


def test_a_damaged_specification_is_refused(tmp_path: Path) -> None:
    path = job.write_stage(tmp_path, Units(tmp_path).stage)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="damaged"):
        job.run_unit(str(path), 0)


def test_a_worker_with_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job.write_stage(tmp_path, Units(tmp_path).stage)
    monkeypatch.setattr(job, "code_version", lambda: "Python 2.7")
    with pytest.raises(RankError, match=r"has Python 2\.7"):
        job.run_unit(str(path), 0)


def test_a_worker_is_sent_little(tmp_path: Path) -> None:
    import pickle
    from functools import partial

    path = job.write_stage(tmp_path, Units(tmp_path).stage)
    assert len(pickle.dumps((partial(job.run_unit, str(path)), 625_000))) < 1024


def test_records_are_read_by_number(tmp_path: Path) -> None:
    records = Records.write(tmp_path / "records", ([number, "x" * number] for number in range(100)))
    assert records[7] == [7, "xxxxxxx"]
    assert len(records) == len(list(records)) == 100


HOLDER = """
import sys
from pathlib import Path
from data_tools.folder import coordinating
with coordinating(Path("out"), Path(sys.argv[1])):
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_second_coordinator_is_refused_until_death(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on "), coordinating(tmp_path, tmp_path):
            pass
        holder.kill()  # not waited for: what is left of it is no process that works
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with coordinating(tmp_path, tmp_path):
            assert (tmp_path / "coordinator").exists()
    assert not list(tmp_path.iterdir())


def test_a_silent_coordinator_elsewhere_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder_module._this_process()
    monkeypatch.setattr(folder_module, "_this_process", lambda: {**here, "host": "node9", "job": "12"})
    stack = coordinating(tmp_path, tmp_path)
    stack.__enter__()
    monkeypatch.setattr(folder_module, "_this_process", lambda: here)
    with (
        pytest.raises(ConfigError, match=r"on node9 \(job 12\), last seen [01] seconds"),
        coordinating(*[tmp_path] * 2),
    ):
        pass
    os.utime(tmp_path / "coordinator", (1, 1))
    with coordinating(tmp_path, tmp_path):
        stack.__exit__(None, None, None)
        assert (tmp_path / "coordinator").exists()  # not the one that it had


def test_a_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder_module._this_process()
    monkeypatch.setattr(folder_module, "_this_process", lambda: {**here, "host": "node9", "job": "12"})
    before = coordinating(tmp_path, tmp_path)
    before.__enter__()
    monkeypatch.setattr(folder_module, "_this_process", lambda: {**here, "job": "12"})
    with coordinating(tmp_path, tmp_path):
        before.__exit__(None, None, None)


def run_folder(out: Path, units: Units, effort: Effort, key: str = "x", restart: bool = False) -> bool:
    made = OutputFolder(out, out / "total", lambda path: path.name in ("total", "units", "log"))
    return made.run(Origin({"key": key}, []), effort, restart, lambda folder: units.stages())


def test_a_folder_is_finished_once_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    units = Units(out)
    effort = Effort(1, silent)
    out.mkdir()
    (out / ".nfs0001").touch()  # as an NFS client leaves, of a file that was open as it was removed
    assert not run_folder(out, units, replace(effort, stage="count"))
    with pytest.raises(ConfigError, match="begun by a command with other key"):
        run_folder(out, units, effort, key="y")
    (out / ".work-removed-123").mkdir()
    assert run_folder(out, units, effort)
    assert sorted(path.name for path in out.iterdir()) == [".nfs0001", "log", "total", "units"]
    assert len(logged(out)) == NUM_UNITS
    (out / "mine").touch()
    assert run_folder(out, units, effort, restart=True)
    assert logged(out) == list(range(NUM_UNITS))
    assert (out / "mine").exists()


def test_a_finished_work_folder_may_vanish(tmp_path: Path) -> None:
    """Another coordinator, which should not be there, has finished first."""
    out = tmp_path / "out"
    units = Units(out)

    def overtaken() -> Iterator[Stage]:
        yield from units.stages()
        (out / ".work").rename(tmp_path / "gone")
        yield Stage("late", [0], lambda number: out / ".work" / "late", units.run)

    made = OutputFolder(out, out / "total", lambda path: False)
    assert made.run(Origin({}, []), Effort(1, silent), False, lambda folder: overtaken())


def test_finished_work_may_vanish_while_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of an array begins when another has committed the result, and not yet removed the work folder."""
    (tmp_path / "total").write_text("done")
    (tmp_path / ".work").mkdir()

    @contextmanager
    def late(out: Path, work: Path) -> Iterator[None]:
        shutil.rmtree(work)
        with coordinating(out, work):
            yield

    monkeypatch.setattr(folder_module, "coordinating", late)
    OutputFolder(tmp_path, tmp_path / "total", lambda path: False).close()
    assert [path.name for path in tmp_path.iterdir()] == ["total"]

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import doctor
from launcher.doctor import read_hostfile
from launcher.nodes import job_slots
from megatrain.distributed.doctor import patience_seconds
from megatrain.distributed.health_checks import RESULT, STARTED
from megatrain.errors import ConfigError


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# ours\nnode1 slots=8\n\nnode2 slots=4 # half of it\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node1\n", "line 1: write each host once, as `node1 slots=8`"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: write each host once"),
        ("node1 slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=8\n", "line 1"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_hostfile(path)


@pytest.mark.parametrize("options", [["--hostfile", "gone"], ["--folder", "gone"]])
def test_a_missing_hostfile_or_folder_exits_2(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", *options]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "gone" in ended.stderr
    assert "Traceback" not in ended.stderr


SRUN = """\
#!{python}
import os, sys, time
words = sys.argv[1:]
print(*words, file=open("asked", "w"))
{body}
"""


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A shell of `salloc` on three nodes, of a SLURM whose srun does as it is told."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-3]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1(x3)")
    monkeypatch.setattr(doctor, "_END_SECONDS", 1.0)

    def write(body: str, job: str = "") -> None:
        for name, script in {"srun": SRUN.format(python=sys.executable, body=body), "scontrol": job}.items():
            (tmp_path / name).write_text(script or "#!/bin/sh\nexit 1\n")
            (tmp_path / name).chmod(0o755)

    return write


ANSWERS = f"""print('{RESULT}{{"findings": [], "readings": []}}', flush=True)"""


@pytest.mark.parametrize(
    ("gres", "tasks", "asked"),
    [
        ("Nodes=node[1-3] CPU_IDs=0-7 Mem=0 GRES=gpu:h100:8(IDX:0-7)", "1(x3)", "--ntasks=24 --ntasks-per-node=8"),
        ("Nodes=node[1-3] CPU_IDs=0 Mem=0 GRES=gpu:2(IDX:0,3),nvme:1", "1(x3)", "--ntasks=6 --ntasks-per-node=2"),
        ("Nodes=node[1-3] CPU_IDs=0 Mem=0 GRES=", "4(x3)", "--ntasks=12 --ntasks-per-node=4"),
        ("", "4(x3)", "--ntasks=12 --ntasks-per-node=4"),
        ("Nodes=node[1-2] CPU_IDs=0 Mem=9 GRES=gpu:4(IDX:0-3)   Nodes=node3 CPU_IDs=0 Mem=9 GRES=gpu:2(IDX:0-1)",
         "1(x3)", "--ntasks=10 --distribution=arbitrary"),
    ],
)  # fmt: skip
def test_every_slot_of_the_job_is_examined(
    gres: str, tasks: str, asked: str, allocation: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", tasks)
    job = f'#!/bin/sh\n[ "$2" = job ] && echo "JobId=7 JOB_GRES=gpu:10   {gres} MinCPUsNode=1"\n'
    allocation(
        f"print(open(os.environ.get('SLURM_HOSTFILE', os.devnull)).read(), file=open('order', 'w'))\n{ANSWERS}", job
    )
    assert doctor.examine(None, None, Path()).findings == []
    words = Path("asked").read_text()
    assert words.startswith("--nodes=3 ")
    assert all(word in words.split() for word in asked.split())
    if "arbitrary" in asked:
        assert Path("order").read_text().split() == ["node1"] * 4 + ["node2"] * 4 + ["node3"] * 2


def test_a_step_is_not_taken_for_the_job(allocation: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1")
    allocation(ANSWERS, '#!/bin/sh\n[ "$2" = job ] && echo "JobId=7 NumNodes=3 NumCPUs=9 NumTasks=8 CPUs/Task=1"\n')
    assert job_slots() == {"node1": 3, "node2": 3, "node3": 2}
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(ConfigError, match="One is enough"):
        doctor.examine(None, None, Path())


def test_what_srun_refuses_is_said_in_its_words(allocation: Callable[..., None]) -> None:
    allocation("sys.exit('srun: error: Unable to create step for job 7: More processors requested than permitted')")
    with pytest.raises(ConfigError, match=r"srun starts no ranks in job 7: .* More processors requested"):
        doctor.examine(None, None, Path())


@pytest.mark.parametrize(
    ("said", "excluded"),
    [
        ("srun: error: Task launch for StepId=7.0 failed on node node2: Communication connection failure", ["node2"]),
        ("srun: error: node[2-3]: tasks 1-2: Killed", ["node2", "node3"]),
        ("srun: error: node[1-3]: tasks 0-2: Exited with exit code 1", []),  # the same everywhere: no node's fault
        ("node22: something", []),
    ],
)
def test_only_nodes_that_srun_names_are_excluded(
    said: str, excluded: list[str], allocation: Callable[..., None]
) -> None:
    allocation(f"print('{STARTED}30', flush=True)\nsys.exit({said!r})")
    found = doctor.examine(None, None, Path())
    assert found.exclude == excluded
    assert said in found.findings[0]


@pytest.mark.slow
def test_patience_is_that_of_the_first_ranks(allocation: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their word it would have ended here; a rank 0 that stays silent is named then."""
    monkeypatch.setattr(doctor, "_START_SECONDS", 0.8)
    monkeypatch.setattr(doctor, "_EXAMINE_SECONDS", 0.5)
    allocation(f"print('node2: {STARTED}4', flush=True)\ntime.sleep(1.5)\n{ANSWERS}")
    assert doctor.examine(None, None, Path()).findings == []
    allocation("time.sleep(60)")
    assert doctor.examine(None, None, Path()).exclude == ["node1"]


def test_patience_grows_with_ranks_and_their_imports() -> None:
    assert patience_seconds(8, 1.0) < 30
    assert patience_seconds(4096, 1.0) > 60
    assert patience_seconds(8, 60.0) > 120

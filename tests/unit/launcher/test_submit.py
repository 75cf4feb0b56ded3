from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.job import cancel_rest
from launcher.submit import clean_environment, submit_script, try_script
from megatrain.errors import ConfigError
from tests.unit.launcher.conftest import Launch

ALLOCATION = {
    **dict.fromkeys(("SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_CPU", "SLURM_TRES_PER_TASK"), "1"),
    **dict.fromkeys(("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURMD_NODENAME", "SLURM_EXPORT_ENV", "SBATCH_MEM_BIND"), "1"),
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK", "MASTER_PORT"), "1"),
    **dict.fromkeys(("SRUN_CPUS_PER_TASK", "PALS_RANKID", "FLUX_TASK_RANK", "HYDI_CONTROL_FD", "ROLE_RANK"), "1"),
}
KEPT = {"PATH": "/bin", "SLURM_CONF": "/etc/x", "SBATCH_ACCOUNT": "me", "NCCL_DEBUG": "INFO", "TMPDIR": "/tmp"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of SLURM's: programs that write down how they are called."""
    programs = {
        "sbatch": 'env > env; echo "sbatch $*" >> asked; case $* in *2*) echo "no such partition" >&2; exit 1;; esac\n'
        "echo 12\necho would start >&2",
        "squeue": "echo '13 afternotok:12(unfulfilled)\n14 afternotok:13(unfulfilled),afterok:9\n15 afternotok:120'",
        "scancel": 'echo "scancel $*" >> asked',
        "scontrol": "echo 'MaxArraySize            = 1001'",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "asked"


def test_sbatch_hears_nothing_of_another_job(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ALLOCATION, **KEPT, "PATH": os.environ["PATH"]}.items():
        monkeypatch.setenv(name, value)
    assert next(submit_script("")) == "12"
    heard = {line.partition("=")[0] for line in slurm.with_name("env").read_text().splitlines()}
    assert not heard & ALLOCATION.keys()
    assert heard >= KEPT.keys()
    assert clean_environment(KEPT) == KEPT


def test_sbatchs_refusal_is_said_in_its_words(slurm: Path) -> None:
    assert try_script("") == "would start"
    with pytest.raises(ConfigError, match=r"sbatch .* refuses the job: no such partition"):
        list(submit_script("", 3))  # of which the second has a dependency on job 12


def test_the_rest_of_a_chain_is_cancelled_backwards(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    cancel_rest()
    assert slurm.read_text() == "scancel 14 13\n"
    assert capsys.readouterr().err == "The rest of the chain is cancelled: 13 14.\n"
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    cancel_rest()
    assert slurm.read_text() == "scancel 14 13\n"


@pytest.mark.parametrize(("tasks", "code"), [("1001", 0), ("1002", 2)])
def test_arrays_are_as_large_as_the_cluster_takes(tasks: str, code: int, slurm: Path, launch: Launch) -> None:
    ended = launch("array", "--tasks", tasks, "--", "sweep", "run.yaml")
    assert ended.code == code
    assert ("MaxArraySize" in ended.err) == (code == 2)


def test_more_tasks_are_several_arrays_a_stage(slurm: Path, launch: Launch) -> None:
    slurm.with_name("sbatch").write_text("#!/bin/bash\necho sbatch $* >> asked; echo 7")
    ended = launch("array", "--tasks", "1500", "--submit", "--", "tokenize", "x")
    assert ended.out.split() == ["7"] * 6
    calls = [" ".join(word for word in call.split() if "/" not in word) for call in slurm.read_text().splitlines()]
    after = "sbatch --parsable --dependency=afterany:7"
    assert calls == [
        "sbatch --parsable --array=0-1000 encode 0 1500",
        "sbatch --parsable --array=0-498 encode 1001 1500",
        f"{after}:7 --array=0 plan",
        f"{after} --array=0-1000 shards 0 1500",
        f"{after} --array=0-498 shards 1001 1500",
        f"{after}:7 --array=0 manifest",
    ]


def test_submitting_makes_the_folder_of_the_output(slurm: Path, launch: Launch, tmp_path: Path) -> None:
    assert launch("slurm", "run.yaml", "--nodes", "1", "--procs-per-node", "4", "--submit").out == "12\n"
    assert (tmp_path / "runs/one/logs").is_dir()

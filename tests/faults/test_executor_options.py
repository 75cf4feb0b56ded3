"""What the launcher and the options say of where a data job runs, and what of that is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.data_jobs import JobFolder, mpirun

# What a rank sees when another MPI's launcher started it: its variables, and a library that knows nothing of them.
FOREIGN_LAUNCHERS = [
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    pytest.param({"PMI_RANK": "0", "PMI_SIZE": "2"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("variables", FOREIGN_LAUNCHERS, ids=["Open MPI", "MPICH"])
def test_a_foreign_mpi_is_refused(variables: dict[str, str], job_folder: JobFolder) -> None:
    done = job_folder.run(job_folder.command("tokenize", "refused"), **variables)
    assert done.returncode == 2, done.stderr
    assert "not the launcher's MPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (job_folder.path / "refused").exists()


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", "0/3"), "should be K/N"),
        (("--share", "1/3", "--restart"), "--restart by one of several tasks"),
        (("--dask", "nowhere.json"), "neither an address such as tls://"),
        (("--dask", "nowhere.json", "--workers", "2"), "leave out --workers and --share"),
        (("--dask-plain",), "nothing without --dask"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], message: str, job_folder: JobFolder) -> None:
    done = job_folder.run(job_folder.command("tokenize", "refused", *options))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (job_folder.path / "refused").exists()


@pytest.mark.slow
def test_workers_option_is_refused_under_mpi(job_folder: JobFolder) -> None:
    done = job_folder.run(mpirun(2, job_folder.command("tokenize", "refused", "--workers", "1")))
    assert done.returncode == 2
    assert "--workers would do nothing under MPI" in done.stderr


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_late_task_finds_nothing_missing(job_folder: JobFolder, alone: Callable[[str], dict[str, bytes]]) -> None:
    """What SLURM tells an array's tasks; a resubmission of some has another count."""
    command = job_folder.command("tokenize", "array", "--workers", "1", "--stage", "encode")

    def task(number: int, job: str, count: int) -> dict[str, str]:
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(count)}
        return {**array, "SLURM_ARRAY_JOB_ID": job, "SLURM_JOB_ID": f"{job}{number}"}

    for number in (2, 0):
        assert job_folder.run(command, **task(number, "7", 3)).returncode == 0
    early = job_folder.run([*command[:-1], "plan"])
    assert early.returncode == 75
    assert "units of the stage 'encode' are missing" in early.stderr
    for number in (1, 0):
        assert job_folder.run(command, **task(number, "8", 2)).returncode == 0
    assert job_folder.run(command, **task(1, "7", 3)).returncode == 0
    assert job_folder.run(command[:-2]).returncode == 0
    assert job_folder.made("array") == alone("tokenize")

"""One command on every executor: the same bytes; also where no lock works, and where files are seen late."""

from __future__ import annotations

import functools
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.faults.data_jobs import COMMANDS, EXECUTORS, JobFolder
from tests.runs import wait_until

Alone = Callable[[str], dict[str, bytes]]

slow, acceptance = pytest.mark.slow, pytest.mark.acceptance


SAMPLED = {
    *(
        ("4 MPI ranks", "tokenize"),
        ("4 workers", "chat"),
        ("4 workers", "images"),
        ("shares", "representative"),
        ("4 MPI ranks", "split"),
    ),
    *(("3 Dask workers", "tokenize"), ("3 Dask workers", "filter")),
}
"""Every kind of command, and every executor; the rest is left to acceptance."""


def cases(sampled: set[tuple[str, str]]) -> list[object]:
    every = [(executor, name) for executor in EXECUTORS for name in COMMANDS]
    return [pytest.param(*each, marks=(slow,) if each in sampled else (slow, acceptance)) for each in every]


@pytest.mark.parametrize(("executor", "name"), cases(SAMPLED))
def test_every_executor_gives_the_same_bytes(executor: str, name: str, job_folder: JobFolder, alone: Alone) -> None:
    EXECUTORS[executor](job_folder, name, f"{name} by {executor}")
    assert job_folder.made(f"{name} by {executor}") == alone(name)


@pytest.mark.sample(1)
@slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("tokenize", "minhash") else acceptance) for name in COMMANDS]
)
def test_an_array_of_slurm_gives_the_same_bytes(name: str, lab: Lab, job_folder: JobFolder, alone: Alone) -> None:
    out = f"{name} by an array"
    words = job_folder.command(name, out)[3:]
    options = ["array", "--tasks", "4", "--cpus-per-task", "1", "--submit", "--", *words]
    env = {**lab.environment, "PYTHONPATH": job_folder.environment()["PYTHONPATH"]}
    command = [sys.executable, "-m", "launcher", *options]
    ended = subprocess.run(command, cwd=job_folder.path, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for number in ended.stdout.split():
        wait_until(lambda: lab.call("squeue", "-h", "-j", number) == "", 0.5)  # noqa: B023 (called at once)
    assert job_folder.made(out) == alone(name)


@pytest.fixture(scope="module")
def preload(job_folder: JobFolder) -> Callable[[str], str]:
    """Compiles a library of this folder, which stands between a process and the file system."""

    def compile_library(name: str) -> str:
        library = job_folder.path / f"{name}.so"
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        return str(library)

    return functools.cache(compile_library)


def with_variables(variables: dict[str, str], function: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        function()


@pytest.mark.sample(1)
@pytest.mark.parametrize(("executor", "name"), cases({("4 workers", "minhash"), ("3 Dask workers", "tokenize")}))
def test_no_executor_needs_file_locks(
    executor: str,
    name: str,
    job_folder: JobFolder,
    alone: Alone,
    preload: Callable[[str], str],
) -> None:
    variables = {"LD_PRELOAD": preload("no_locks"), "LOCK_LOG": str(job_folder.path / "locks.log")}
    probe = "import fcntl; fcntl.flock(open('probe', 'w'), fcntl.LOCK_EX)"
    assert "Function not implemented" in job_folder.run([sys.executable, "-c", probe], **variables).stderr
    assert (job_folder.path / "locks.log").read_text().startswith("flock")
    out = f"{name} by {executor} without locks"
    with_variables(variables, lambda: EXECUTORS[executor](job_folder, name, out))
    assert job_folder.made(out) == alone(name)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("executor", "name"), cases({("4 workers", "minhash"), ("shares", "tokenize")}))
def test_files_that_are_seen_late_are_awaited(
    executor: str,
    name: str,
    job_folder: JobFolder,
    alone: Alone,
    preload: Callable[[str], str],
) -> None:
    out, log = f"{name} by {executor}, late", job_folder.path / f"{name} {executor} late.log"
    variables = {"LD_PRELOAD": preload("late_files"), "LATE_LOG": str(log)}
    with_variables(variables, lambda: EXECUTORS[executor](job_folder, name, out))
    assert log.stat().st_size > 0
    assert job_folder.made(out) == alone(name)


def own_address() -> str:
    """The address of this machine that others reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but the loopback's")
        return str(probe.getsockname()[0])


@slow
def test_a_dask_scheduler_without_tls_is_refused(job_folder: JobFolder) -> None:
    with job_folder.dask_cluster(1, "--host", own_address()) as (file, *_):
        command = job_folder.command("tokenize", "plain", "--dask", file)
        ended = job_folder.run(command)
        assert (ended.returncode, "is not encrypted" in ended.stderr) == (2, True), ended.stderr
        assert not (job_folder.path / "plain").exists()
        assert job_folder.run([*command, "--dask-plain"]).returncode == 0


@slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl (apt-get install openssl)")
def test_dask_over_tls_gives_the_same_bytes(job_folder: JobFolder, alone: Alone) -> None:
    """By the certificates that Dask's own configuration names, on all sides."""
    key, certificate = job_folder.path / "key.pem", job_folder.path / "certificate.pem"
    subject = ["-days", "2", "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject]
    subprocess.run(words, check=True, capture_output=True)
    names = {"CA_FILE": certificate}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        names |= {f"{role}__CERT": certificate, f"{role}__KEY": key}
    variables = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(path) for name, path in names.items()}
    variables["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "True"
    with job_folder.dask_cluster(2, "--host", own_address(), "--protocol", "tls", **variables) as (file, *_):
        assert "tls://" in Path(file).read_text()
        ended = job_folder.run(job_folder.command("tokenize", "over TLS", "--dask", file), **variables)
        assert ended.returncode == 0, ended.stderr
    assert job_folder.made("over TLS") == alone("tokenize")

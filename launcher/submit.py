"""What sbatch and its like are asked: to take a script, to say whether they would, and to drop jobs that wait."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from megatrain.errors import ConfigError

_SETTINGS = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_MPI_TYPE", "SLURM_TIME_FORMAT"}
_OF_A_JOB = re.compile(
    r"(SLURM|SLURMD|PMI|PMIX|OMPI|PRTE|PALS|FLUX|HYDRA|HYDI|MV2_COMM|TORCHELASTIC)_.*|SBATCH_(CPU|MEM)_BIND.*"
    r"|SRUN_CPUS_PER_TASK|MPI_LOCAL.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|(LOCAL|CROSS)_SIZE|CROSS_RANK"
    r"|MASTER_(ADDR|PORT)|MEGATRAIN_(SUPERVISOR|LAUNCHED_AT)"
    r"|MEGATRAIN_(DEVICE|BIND_CORES|ASSIGNED_DEVICES)|DS_ACCELERATOR"
    r"|(CUDA|ROCR|HIP)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
)
_ARRAY_LIMIT = re.compile(r"^MaxArraySize\s*=\s*(\d+)$", re.MULTILINE)
_SECONDS = 30


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a job told the processes in it, which another job, submitted from there, would take for its own."""
    return {key: value for key, value in environ.items() if key in _SETTINGS or not _OF_A_JOB.fullmatch(key)}


def submit_script(text: str, num_jobs: int = 1) -> Iterator[str]:
    """Submit a script; the job ids, one after the other.

    Of several jobs each waits for the one before, and starts only if that has not ended with 0. Raises ConfigError with
    sbatch's own words where it refuses.
    """
    before: str | None = None
    for _ in range(num_jobs):
        after = [f"--dependency=afternotok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        ended = _sbatch(["--parsable", *after], text)
        sys.stderr.write(ended.stderr)  # what a site's sbatch has to say of a job that it takes
        before = ended.stdout.strip().split(";")[0]
        yield before


def try_script(text: str) -> str:
    return _sbatch(["--test-only"], text).stderr.strip()


def make_logs(logs: Path) -> None:
    """Make the folder of a job's output, without which SLURM would fail the job. Raises ConfigError."""
    _find("sbatch", "--submit")
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{logs} cannot be made: {error.strerror}. It has to be on shared storage.") from None


def submit_stages(text: str, stages: Iterable[Sequence[tuple[Sequence[str], Sequence[str]]]]) -> Iterator[str]:
    """Submit a script for each job of each stage, with options of sbatch and words for the script; the job ids.

    A stage's jobs begin when all of the stage before have ended, however they did: each looks for itself what is done.
    Raises ConfigError with sbatch's own words where it refuses.
    """
    before: list[str] = []
    for jobs in stages:
        after = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        before = []
        for options, words in jobs:
            ended = _sbatch(["--parsable", *after, *options], text, words)
            sys.stderr.write(ended.stderr)
            before.append(ended.stdout.strip().split(";")[0])
            yield before[-1]


def max_array_tasks() -> int | None:
    """How many tasks an array of this cluster has at the most; None where there is no cluster to ask."""
    limit = _ARRAY_LIMIT.search(_output_of("scontrol", "show", "config"))
    return int(limit[1]) if limit else None


def job_state(job: str) -> str | None:
    """What squeue says of a job, in words; None where it knows of none."""
    known = _output_of("squeue", "-h", "-j", job, "-o", "%T|%M|%N|%r|%S").strip().splitlines()
    if not known:
        return None
    state, since, nodes, reason, begin = known[0].split("|")
    if state == "PENDING":
        return f"PENDING, {reason}" + (f", starts at {begin}" if begin not in ("N/A", "") else "")
    return f"{state} for {since}" + (f" on {nodes}" if nodes else "")


def cancel_chain(job: str) -> list[str]:
    """Cancel the jobs that wait for a job to fail, and those that wait for these; which, the last one first."""
    waits = [
        line.split()
        for line in _output_of("squeue", f"--user={os.getuid()}", "-h", "-t", "PENDING", "-o", "%i %E").splitlines()
    ]
    chain = [job]
    for before in chain:
        after = [words[0] for words in waits if re.search(rf"afternotok:{before}(?!\d)", " ".join(words[1:]))]
        chain += [number for number in after if number not in chain]
    rest = chain[:0:-1]
    if rest:
        _output_of("scancel", *rest)
    return rest


def _sbatch(options: Sequence[str], text: str, words: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [_find("sbatch", options[0]), *options]
    environment = clean_environment(os.environ)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:  # words come behind the name of a file alone
        if words:
            script.write(text)
            script.flush()
            command += [script.name, *words]
        ended = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ConfigError(f"sbatch {' '.join(options)} refuses the job: {ended.stderr.strip()}")
    return ended


def _find(program: str, option: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"{option}: there is no {program} here. Print the script, and submit it where there is.")
    return found


def _output_of(*command: str) -> str:
    """What one of SLURM's programs prints; nothing where it is not there, or does not answer."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout

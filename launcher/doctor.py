"""Examines nodes before a run is started on them: which are there, and which node, rank or link is bad."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from launcher.nodes import job_slots
from megatrain.distributed.binding import ASSIGNED_DEVICES
from megatrain.distributed.bootstrap import extensions_dir, free_port, visible_gpus
from megatrain.distributed.health_checks import RESULT, STARTED
from megatrain.distributed.node_list import expand
from megatrain.errors import ConfigError

RANK_MODULE = "megatrain.distributed.doctor"
_OF_THE_JOBS_TASKS = re.compile(r"SLURM_(NTASKS|NPROCS|NTASKS_PER_NODE|CPUS_PER_TASK|DISTRIBUTION|[CG]PU_BIND.*)")
"""What srun would take for options of its own."""
_SSH_SECONDS, _NUM_SSH = 5, 64
_START_SECONDS, _SECONDS_A_RANK = 120.0, 0.02
"""Until a first rank is heard of, which then says how long it waits for the others."""
_EXAMINE_SECONDS = 75.0
_END_SECONDS = 10.0


class Diagnosis(NamedTuple):
    """``findings``: what is bad, in words; ``exclude``: the nodes to leave out; ``readings``: what each rank found."""

    findings: list[str]
    exclude: list[str]
    readings: list[dict[str, Any]]


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and how many ranks each takes, as DeepSpeed reads them: ``node1 slots=8``. Raises ConfigError."""
    try:
        lines = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error}.") from None
    hosts: dict[str, int] = {}
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) == 0 or words[0].startswith("-") or words[0] in hosts:
            raise ConfigError(f"--hostfile {path}, line {number}: write each host once, as `node1 slots=8`.")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host: write each on a line, as `node1 slots=8`.")
    return hosts


def examine(hostfile: Path | None, procs_per_node: int | None, folder: Path) -> Diagnosis:
    """Examine the hosts of ``hostfile``, else the nodes of the SLURM job around us, else this machine.

    ``folder``: where runs are written. Raises ConfigError where the ranks cannot be started at all.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder} is no folder: give the one that runs are written into.")
    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        return _through_deepspeed({host: procs_per_node or slots for host, slots in hosts.items()}, folder)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError("srun starts several doctors here. One is enough: it starts a rank on each slot of the job.")
    if "SLURM_JOB_ID" in os.environ:
        return _through_srun({host: procs_per_node or slots for host, slots in job_slots().items()}, folder)
    return _through_deepspeed({"localhost": procs_per_node or len(visible_gpus()) or 1}, folder)


def _through_srun(hosts: Mapping[str, int], folder: Path) -> Diagnosis:
    """Through a step of the job around us, beside what else runs in it, whose tasks may be fewer than our ranks."""
    num_ranks = sum(hosts.values())
    starter = ["srun", f"--nodes={len(hosts)}", f"--ntasks={num_ranks}", "--overcommit", "--overlap"]
    starter += ["--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none", "--export=ALL"]
    with tempfile.TemporaryDirectory() as aside:
        environment = {name: value for name, value in os.environ.items() if not _OF_THE_JOBS_TASKS.fullmatch(name)}
        environment |= {"MASTER_ADDR": next(iter(hosts)), "MASTER_PORT": str(free_port())}  # not that of the job's run
        if len(set(hosts.values())) == 1:
            starter += [f"--ntasks-per-node={num_ranks // len(hosts)}", "--distribution=block"]
        else:
            order = Path(aside) / "hosts"
            order.write_text("".join(f"{host}\n" * slots for host, slots in hosts.items()))
            starter += ["--distribution=arbitrary"]
            environment["SLURM_HOSTFILE"] = str(order)
        return _run_ranks([*starter, sys.executable, "-m", RANK_MODULE, *_arguments(hosts, folder)], hosts, environment)


def _through_deepspeed(hosts: Mapping[str, int], folder: Path) -> Diagnosis:
    is_here = list(hosts) == ["localhost"]
    silent = {} if is_here else _unreachable(list(hosts))
    there = {host: slots for host, slots in hosts.items() if host not in silent}
    found = Diagnosis([f"{host} cannot be reached: {why}" for host, why in silent.items()], list(silent), [])
    if not there:
        return found
    first = next(iter(there))
    with tempfile.TemporaryDirectory() as aside:
        hostfile = Path(aside) / "hostfile"
        hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in there.items()))
        starter = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_local_rank"]
        starter += ["--log_level", "critical", "--master_port", str(free_port())]
        starter += ["--no_ssh_check", "--master_addr", "127.0.0.1"] if is_here else []
        starter += [] if is_here else ["--force_multi", "--master_addr", first]
        environment = dict(os.environ)
        if is_here and "CUDA_VISIBLE_DEVICES" in environment:  # DeepSpeed's launcher would take the first ones
            environment[ASSIGNED_DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
        more = _run_ranks([*starter, "--module", RANK_MODULE, *_arguments(there, folder)], there, environment)
    return Diagnosis(found.findings + more.findings, found.exclude + more.exclude, more.readings)


def _arguments(hosts: Mapping[str, int], folder: Path) -> list[str]:
    named = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
    return [str(folder), "--scratch", str(extensions_dir()), "--hosts", named]


def _unreachable(hosts: Sequence[str]) -> dict[str, str]:
    """The hosts on which this Python cannot be called over ssh without a password, and why."""

    def ask(host: str) -> str:
        command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}", host, sys.executable, "-V"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=4 * _SSH_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer in {4 * _SSH_SECONDS} s"
        return "" if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["ssh fails"])[-1]

    if shutil.which("ssh") is None:
        raise ConfigError("there is no ssh here, through which DeepSpeed starts ranks on other nodes.")
    with ThreadPoolExecutor(_NUM_SSH) as pool:
        return {host: why for host, why in zip(hosts, pool.map(ask, hosts), strict=True) if why}


def _run_ranks(command: Sequence[str], hosts: Mapping[str, int], environment: Mapping[str, str]) -> Diagnosis:
    """Start the ranks; what rank 0 says, or that it says nothing. Raises ConfigError where none could be started."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            launcher = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}.") from None
        assert launcher.stdout is not None
        has_started, result = _read_result(launcher.stdout, sum(hosts.values()))
        is_silent = result is None and launcher.poll() is None and not _has_ended(launcher)
        _end(launcher)
        errors.seek(0)
        last_words = errors.read().strip().splitlines()
    if result is not None:
        found = orjson.loads(result)
        bad = [host for _, names, _ in found["findings"] for host in names]
        return Diagnosis([text for text, _, _ in found["findings"]], list(dict.fromkeys(bad)), found["readings"])
    first = next(iter(hosts))
    blamed = [first] if is_silent else _hosts_in(last_words, hosts)
    if not has_started and not blamed and command[0] == "srun":
        raise ConfigError(f"srun starts no ranks in job {environment['SLURM_JOB_ID']}: {' '.join(last_words[-10:])}")
    silence = f"rank 0 on {first} gave no answer; its launcher's last words:"
    return Diagnosis(["\n".join([silence, *last_words[-10:]])], blamed, [])


def _read_result(output: Iterable[str], num_ranks: int) -> tuple[bool, str | None]:
    """Whether a rank was heard of before the output ended, or patience did; and rank 0's result."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="doctor", daemon=True).start()
    has_started, deadline = False, time.monotonic() + _START_SECONDS + _SECONDS_A_RANK * num_ranks
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return has_started, None
        if line is None:
            return has_started, None
        if RESULT in line:
            return True, line.partition(RESULT)[2]
        if STARTED in line:  # it waits so long for the others, and then looks at them
            has_started = True
            deadline = max(deadline, time.monotonic() + float(line.partition(STARTED)[2]) + _EXAMINE_SECONDS)


def _has_ended(launcher: subprocess.Popen[str]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(_END_SECONDS)
    return launcher.returncode is not None


def _end(launcher: subprocess.Popen[str]) -> None:
    """Ranks that have answered end by themselves; others are told to, through what started them."""
    for ask in (launcher.terminate, launcher.kill):
        if _has_ended(launcher):
            return
        ask()
    launcher.wait()


def _hosts_in(lines: Iterable[str], hosts: Mapping[str, int]) -> list[str]:
    """The hosts that a launcher names in its last words; none, where it names all of several."""
    words = {word.strip(".-") for line in lines for word in re.findall(r"[\w.-]+", line)}
    words |= {
        name for line in lines for group in re.findall(r"[\w.-]+\[[\d,-]+\][\w.-]*", line) for name in expand(group)
    }
    named = [host for host in hosts if host in words]
    return named if len(named) < len(hosts) or len(hosts) == 1 else []

"""Examines nodes before a run is started on them: which are there, and which node, rank or link is bad."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from launcher.nodes import job_nodes
from megatrain.distributed.bootstrap import extensions_dir, free_port, visible_gpus
from megatrain.distributed.judgement import ANSWER
from megatrain.errors import ConfigError

RANK_MODULE = "megatrain.distributed.doctor"
_SSH_SECONDS, _NUM_SSH = 5, 64
_PATIENCE_SECONDS = 100


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
    num_ranks = procs_per_node or len(visible_gpus()) or 1
    if "SLURM_JOB_ID" in os.environ:
        return _through_srun(num_ranks, folder)
    return _through_deepspeed({"localhost": num_ranks}, folder)


def _through_srun(num_ranks: int, folder: Path) -> Diagnosis:
    nodes = job_nodes()
    hosts = dict.fromkeys(nodes, num_ranks)
    size = [f"--nodes={len(nodes)}", f"--ntasks={num_ranks * len(nodes)}", f"--ntasks-per-node={num_ranks}"]
    starter = ["srun", *size, "--kill-on-bad-exit=0", "--wait=30", "--cpu-bind=none", sys.executable, "-m", RANK_MODULE]
    return _ask([*starter, *_arguments(hosts, folder)], hosts)


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
        more = _ask([*starter, "--module", RANK_MODULE, *_arguments(there, folder)], there)
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


def _ask(command: Sequence[str], hosts: Mapping[str, int]) -> Diagnosis:
    """Start the ranks; what rank 0 says, or that it says nothing."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
        output, said = ended.stdout, ended.stderr
    except subprocess.TimeoutExpired as error:
        output, said = _text(error.stdout), _text(error.stderr)
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error.strerror}.") from None
    for line in output.splitlines():
        if ANSWER in line:
            answer = orjson.loads(line.partition(ANSWER)[2])
            texts = [text for text, _, _ in answer["findings"]]
            bad = [host for _, names, _ in answer["findings"] for host in names]
            return Diagnosis(texts, list(dict.fromkeys(bad)), answer["readings"])
    first = next(iter(hosts))
    words = said.strip().splitlines()[-10:]
    silence = f"rank 0 on {first} gave no answer; its launcher's last words:"
    return Diagnosis(["\n".join([silence, *words])], [first], [])


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""

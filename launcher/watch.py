"""Looks after the nodes on which `deepspeed` starts ranks over ssh, while the ranks wait for each other.

pdsh waits for all nodes, so where the ranks of one have ended in their first moment, or never began, nobody would tell
the others, which wait for ranks that they have never heard of. (One that they have heard of, they miss by themselves.)
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from launcher.doctor import read_hostfile
from megatrain.distributed import failures
from megatrain.distributed.bootstrap import start_name
from megatrain.distributed.liveness import has_everyone_joined
from megatrain.errors import EXIT_RANK

_LOOK_SECONDS = 0.5
_PATIENCE_SECONDS = 8.0  # ranks that end together do not do so in the same moment


def watch_nodes(run_dir: Path, launcher: int, hostfile: Path) -> None:
    """Until the process ``launcher`` has ended, all ranks have joined each other, or ssh to one of several hosts has
    ended, and not to the others.

    Then that is the failure of this start, and whoever waits for the ranks of that host ends. Once all have joined they
    have read the file of variables, which is removed.
    """
    hosts = list(read_hostfile(hostfile))
    missing_since: float | None = None
    while len(hosts) > 1 and psutil.pid_exists(launcher):
        if has_everyone_joined(run_dir, start_name()):
            hostfile.with_name("environment.sh").unlink(missing_ok=True)
            return
        reached = _reached(launcher, hosts)
        missing = [host for host in hosts if host not in reached] if reached else []
        missing_since = (missing_since or time.monotonic()) if missing else None
        if missing_since is not None and time.monotonic() > missing_since + _PATIENCE_SECONDS:
            report = _report(missing)
            if failures.claim(run_dir, start_name(), failures.Failure(None, EXIT_RANK, report)):
                sys.stderr.write(f"{report}\n")
            return
        time.sleep(_LOOK_SECONDS)


def _report(hosts: Sequence[str]) -> str:
    return (
        f"On {', '.join(hosts)} the ranks ended, or could not be started, while the others waited for them: the output "
        "above may say why."
    )


def _reached(launcher: int, hosts: Sequence[str]) -> set[str]:
    """The hosts that a process below the launcher, such as ssh, is connected with: the first host that it names.

    Processes that started others do not count: pdsh names all hosts, whatever has become of them.
    """
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(launcher).children(recursive=True)
        parents = {process.pid: process.ppid() for process in below if process.is_running()}
        for process in below:
            with contextlib.suppress(psutil.Error):
                if process.pid not in parents.values():
                    found.update([word for word in process.cmdline() if word in hosts][:1])
    return found

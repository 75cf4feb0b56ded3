"""What the processes of a command ask of the file system and send each other, as strace sees it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt-get install strace)")

OPENS = ("open", "openat")
LOOKS = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink")
CHANGES = ("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir")
SENDS = ("write", "writev", "sendto", "sendmsg")
STARTS = ("clone", "clone3", "fork", "vfork")
TRACED = (*OPENS, *LOOKS, *CHANGES, *SENDS, *STARTS, "getdents64")
KINDS = {call: kind for kind, calls in {"opens": OPENS, "looks": LOOKS, "changes": CHANGES}.items() for call in calls}

_CALL = re.compile(r"(\w+)\((.*)\) += (\S+)")
_PATH = re.compile(r'"([^"]*)"')
_CHANNEL = re.compile(r"(\d+)<(?:pipe|socket|UNIX[^:]*|TCP[^:]*):")
_ENTRIES = re.compile(r"/\* (\d+) entries \*/")


def count_calls(command: Sequence[str], folder: Path, scratch: Path) -> list[Counter[str]]:
    """Run the command, and count for each of its processes, itself first, in the order in which they were started.

    Counted are the calls with a path in ``folder`` (`opens`, `looks`, `changes`), the entries of folders there that
    were listed (`listed`), and what was sent through pipes and sockets (`messages`, `sent_bytes`).
    """
    scratch.mkdir()
    names = ",".join(f"?{call}" for call in TRACED)
    strace = ["strace", "-ff", "--seccomp-bpf", "-qq", "-yy", "-s", "4096", "-e", f"trace={names}"]
    strace += ["-e", "signal=none", "-o", str(scratch / "trace")]
    with (scratch / "output").open("wb") as output:
        ended = subprocess.run([*strace, *command], stdout=output, stderr=output)
    assert ended.returncode == 0, (scratch / "output").read_text()
    counts: dict[str, Counter[str]] = {}
    processes: dict[str, str] = {}
    threads = {path.suffix[1:]: path for path in scratch.glob("trace.*")}
    first = next(iter(threads.keys() - _started(threads)))
    waiting = [first]
    while waiting:
        thread = waiting.pop(0)
        process = processes.setdefault(thread, thread)
        counted = counts.setdefault(process, Counter())
        for call, arguments, result in _CALL.findall(threads[thread].read_text(errors="replace")):
            _count(counted, call, arguments, result, str(folder))
            if call in STARTS and result in threads:
                processes[result] = process if "CLONE_THREAD" in arguments else result
                waiting.append(result)
    return list(counts.values())


def _started(threads: dict[str, Path]) -> set[str]:
    calls = (call for path in threads.values() for call in _CALL.findall(path.read_text(errors="replace")))
    return {result for call, _, result in calls if call in STARTS}


def _count(counted: Counter[str], call: str, arguments: str, result: str, folder: str) -> None:
    if call in KINDS:
        path = _PATH.search(arguments)
        counted[KINDS[call]] += path is not None and path[1].startswith(folder)
    elif call == "getdents64" and f"<{folder}" in arguments and (entries := _ENTRIES.search(arguments)):
        counted["listed"] += int(entries[1])
    elif call in SENDS and (channel := _CHANNEL.match(arguments)) and int(channel[1]) > 2:
        counted["messages"] += 1
        counted["sent_bytes"] += max(int(result), 0) if result.lstrip("-").isdecimal() else 0

"""Options of sbatch: whose of them win, which cannot be changed, and how they are written into a script."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from megatrain.errors import ConfigError

_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?", re.DOTALL)
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_GPUS = re.compile(r"(?:(?P<type>[A-Za-z][\w.-]*):)?(?P<count>[1-9]\d*)", re.ASCII)
_GRES = re.compile(r"(?:^|,)gpu(?::[A-Za-z][\w.-]*)?(?::(\d+))?(?=,|$)", re.ASCII)
_TYPED = re.compile(r"(?:^|,)(?:[A-Za-z][\w.-]*:?)?(\d*)(?=,|$)", re.ASCII)
_SAME_SUBJECT = {
    "--mem-per-cpu": "--mem",
    "--mem-per-gpu": "--mem",
    "--oversubscribe": "--exclusive",
    "--gpus": "--gpus-per-node",
    "--gpus-per-task": "--gpus-per-node",
    "--gpus-per-socket": "--gpus-per-node",
}
_OURS = {
    "--nodes": "--nodes",
    "--ntasks": "--nodes and --gpus-per-node",
    "--ntasks-per-node": "--gpus-per-node or --procs-per-node",
    "--cpus-per-task": "--cpus-per-task",
    "--array": "--tasks",
    "--signal": "--signal-seconds",
    "--requeue": "--chain",
    "--no-requeue": "--chain",
}
_NOBODYS = ("--chdir", "--open-mode", "--wrap", "--parsable", "--test-only", "--dependency")


def merged(*layers: Iterable[str]) -> list[str]:
    """One option on each subject: that of the last layer which has one. --mem and --mem-per-cpu are one subject."""
    chosen: dict[str, str] = {}
    for layer in layers:
        for option in layer:
            chosen.pop(subject(option), None)
            chosen[subject(option)] = option
    return list(chosen.values())


def subject(option: str) -> str:
    """What an option is about: its name, but one for all that exclude each other."""
    name, _, value = option.partition("=")
    if name == "--gres" and _GRES.search(value):
        return "--gpus-per-node"
    return _SAME_SUBJECT.get(name, name)


def value_of(options: Iterable[str], name: str) -> str | None:
    return next((option.partition("=")[2] for option in options if option.partition("=")[0] == name), None)


def check_passed(options: Iterable[str], source: str) -> None:
    for option in options:
        name = option.partition("=")[0]
        if not _OPTION.fullmatch(option):
            raise ConfigError(f"{source}: {option!r} is not an option of sbatch in its long form, such as --mem=64G.")
        if name in _OURS:
            raise ConfigError(f"{source}: {name} follows from {_OURS[name]}, on which the script depends: give that.")
        if name in _NOBODYS:
            raise ConfigError(f"{source}: {name} is settled by the script, which depends on it. Leave it out.")


def read_gpus(text: str) -> int:
    match = _GPUS.fullmatch(text)
    if match is None:
        raise ConfigError(f"--gpus-per-node {text}: give a number, or a type and a number, such as h100:8.")
    return int(match["count"])


def check_gpus(options: Iterable[str], ranks_per_node: int, nodes: int) -> None:
    per_node = {"--gres": 1.0, "--gpus-per-node": 1.0, "--gpus-per-task": float(ranks_per_node), "--gpus": 1 / nodes}
    for option in options:
        name, _, value = option.partition("=")
        counts = [int(count or 1) for count in (_GRES if name == "--gres" else _TYPED).findall(value)]
        given = sum(counts) * per_node.get(name, 0.0)
        if given and given != ranks_per_node:
            raise ConfigError(
                f"{option} gives {given:g} GPU(s) on each node to {ranks_per_node} rank(s): both must be the same."
            )


def limit_seconds(limit: str) -> int | None:
    """A limit as sbatch takes it (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s); None for none: 0, UNLIMITED.

    Raises ConfigError for other text.
    """
    if limit.upper() in {"INFINITE", "UNLIMITED"}:
        return None
    match = _TIME.fullmatch(limit)
    if match is None:
        raise ConfigError(f"--time {limit}: give minutes, minutes:seconds, hours:minutes:seconds, or days-hours.")
    parts = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        hours += int(match["days"]) * 24
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else (0, *[*parts, 0][:2])
    return (hours * 60 + minutes) * 60 + seconds or None


def check_limit(options: Iterable[str], signal_seconds: int = 0) -> None:
    """Raise ConfigError for a limit that sbatch does not read, or that is no longer than the signal ahead of it."""
    limit = value_of(options, "--time")
    if limit is not None and (seconds := limit_seconds(limit)) is not None and seconds <= signal_seconds:
        raise ConfigError(
            f"--time {limit} is no longer than --signal-seconds {signal_seconds}: the run would be asked to end as "
            "it begins. Give more time, or a signal closer to the limit."
        )


def as_comment(option: str) -> str:
    """An option as sbatch reads it in a comment: quotes as in a shell, but a backslash escapes even inside of them."""
    return shlex.quote(option.replace("\\", "\\\\"))

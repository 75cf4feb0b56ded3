"""`--help` is quick and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MOST_CPU_SECONDS = 0.5  # CPU time, as the machine may be busy; on an idle one it is the time that a user waits
COMMANDS = [
    [],
    ["check"],
    ["plan"],
    ["train"],
    ["generate"],
    ["eval"],
    ["report"],
    ["checkpoint"],
    ["checkpoint", "list"],
    ["checkpoint", "inspect"],
    ["checkpoint", "verify"],
]
LAUNCH_COMMANDS = [[], ["slurm"], ["job"], ["job", "begin"]]
_MEASURE = """
import importlib, json, resource, sys
name, module, *words = sys.argv[1:]
sys.argv = [name, *words, "--help"]
main = importlib.import_module(module).main
try:
    main()
except SystemExit as ended:
    used = resource.getrusage(resource.RUSAGE_SELF)
    loaded = sorted({"torch", "deepspeed", "numpy", "transformers"} & sys.modules.keys())
    print(json.dumps([ended.code, used.ru_utime + used.ru_stime, loaded]), file=sys.stderr)
"""


def _all() -> list[object]:
    named = [["megatrain", "megatrain.cli", *command] for command in COMMANDS]
    named += [["megatrain-launch", "launcher.cli", *command] for command in LAUNCH_COMMANDS]
    return [pytest.param(command, id=" ".join([command[0], *command[2:]])) for command in named]


@pytest.mark.parametrize("command", _all())
def test_help_answers_at_once_without_torch(command: list[str]) -> None:
    measured = []
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, timeout=60)
        code, seconds, loaded = json.loads(ended.stderr.splitlines()[-1])
        assert code in (0, None)
        assert loaded == []
        assert f"Usage: {command[0]}" in ended.stdout
        measured.append(seconds)
    assert min(measured) < MOST_CPU_SECONDS

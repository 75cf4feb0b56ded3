"""`--help` is quick and needs no torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

MOST_CPU_SECONDS = 0.5  # CPU time, as the machine may be busy; on an idle one it is the time that a user waits
COMMANDS = {
    "megatrain": (
        "megatrain.cli",
        *("", "check", "plan", "train", "generate", "eval", "report"),
        *("checkpoint", "checkpoint list", "checkpoint inspect", "checkpoint verify"),
    ),
    "megatrain-launch": ("launcher.cli", "", "slurm", "job", "job begin"),
}
_MEASURE = """
import importlib, json, resource, sys
name, module, *pages = sys.argv[1:]

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

main = importlib.import_module(module).main
for page in pages:
    sys.argv = [name, *page.split(), "--help"]
    try:
        main()
    except SystemExit as ended:
        loaded = sorted({"torch", "deepspeed", "numpy", "transformers"} & sys.modules.keys())
        print(json.dumps([ended.code, used(), loaded]), file=sys.stderr)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_at_once_without_torch(name: str) -> None:
    """Each page after the first takes what it adds to the first's time."""
    module, *pages = COMMANDS[name]
    measured = []
    for _ in range(2):
        command = [sys.executable, "-c", _MEASURE, name, module, *pages]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        codes, seconds, loaded = zip(*map(json.loads, ended.stderr.splitlines()), strict=True)
        assert (len(codes), set(codes)) == (len(pages), {0})
        assert not any(loaded)
        for page in pages:
            assert f"Usage: {name} {page}".strip() in ended.stdout
        measured.append([seconds[0], *(seconds[0] + after - before for before, after in itertools.pairwise(seconds))])
    assert max(map(min, zip(*measured, strict=True))) < MOST_CPU_SECONDS

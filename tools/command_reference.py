"""docs/commands.md, written from the commands' --help: `python -m tools.command_reference > docs/commands.md`."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

COMMANDS = {"megatrain": "megatrain.cli", "megatrain-data": "data_tools.cli", "megatrain-launch": "launcher.cli"}
_INTRODUCTION = """\
# Commands

Each command has a folder of the repository: `megatrain/`, `data_tools/`, `launcher/`. `python -m FOLDER` runs it too.
`--help` shows the same text as this page, in under half a second. This page is generated from the commands; a test
keeps the two equal.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug |
| 2 | usage or config |
| 3 | data |
| 4 | checkpoint, or the run folder is in use |
| 5 | a rank failed or hung |
| 75 | stopped early on request, state saved: start it again |
| 130 | Ctrl-C, in a command that does not train |

A run leaves these files in its folder:

| file | content |
|---|---|
| `config.yaml` | the resolved config, with every default |
| `metrics.jsonl` | one line for each logged step, validation and event |
| `tensorboard/` | the same figures as TensorBoard events |
| `tracker-*.json`, `wandb/`, `mlruns/` | of `observe.trackers`: the run's id; what was recorded without a server |
| `logs/` | one file for each rank and tracker |
| `checkpoints/` | `step-00000320/`, ... |
"""


def reference() -> str:
    """The page: every command with its arguments and options, as typer writes them in Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(name, module) for name, module in COMMANDS.items())]).rstrip() + "\n"


def _section(name: str, module: str) -> str:
    words = [str(Path(sys.executable).with_name("typer")), module, "utils", "docs", "--name", name]
    written = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return re.sub(r"(?m)^#", "##", html.unescape(written))


if __name__ == "__main__":
    sys.stdout.write(reference())

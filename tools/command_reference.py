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
`--help` shows the same text as this page, in under half a second. The README lists the exit codes.

This page is generated from the commands; a test keeps the two equal.
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

"""What the examples have in common: they run commands of megatrain, shown, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def enter(folder: Path) -> None:
    """Go to a folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)


def run(*command: str) -> str:
    """Run a command of this installation; what it prints."""
    sys.stderr.write(f"$ {' '.join(command)}\n")
    name, *options = command
    ended = subprocess.run([str(Path(sys.executable).parent / name), *options], stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(ended.stdout + f"{name} ended with code {ended.returncode}")
    return ended.stdout


def shown(metric: Mapping[str, Any]) -> str:
    """A metric of a task, as in a table."""
    return f"{metric['value']:.3f} ± {metric['stderr']:.3f}"

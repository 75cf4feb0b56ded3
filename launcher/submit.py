"""Handing a script to sbatch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatrain.errors import ConfigError

SCRIPT = "job.sh"


def submit_script(text: str, logs: Path, num_jobs: int) -> Iterator[str]:
    """Keep the script as LOGS/job.sh and submit it; the job ids, one after the other.

    Of several jobs each waits for the one before, and starts only if that has not ended with 0. Raises ConfigError with
    sbatch's own words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--submit: there is no sbatch here. Leave it out, and submit what is printed where there is.")
    path = logs / SCRIPT
    path.write_text(text, encoding="utf-8")
    before: str | None = None
    for _ in range(num_jobs):
        after = [f"--dependency=afternotok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        ended = subprocess.run(["sbatch", "--parsable", *after, str(path)], capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ConfigError(f"sbatch refused {path}: {ended.stderr.strip()}")
        before = ended.stdout.strip().split(";")[0]
        yield before

"""Handing a script to sbatch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from megatrain.errors import ConfigError


def submit_script(text: str, num_jobs: int = 1) -> Iterator[str]:
    """Submit a script; the job ids, one after the other.

    Of several jobs each waits for the one before, and starts only if that has not ended with 0. Raises ConfigError with
    sbatch's own words where it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--submit: there is no sbatch here. Leave it out, and submit what is printed where there is.")
    before: str | None = None
    for _ in range(num_jobs):
        after = [f"--dependency=afternotok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        command = ["sbatch", "--parsable", *after]
        ended = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise ConfigError(f"{' '.join(command)} refuses the job: {ended.stderr.strip()}")
        before = ended.stdout.strip().split(";")[0]
        yield before

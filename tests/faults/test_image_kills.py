"""SIGKILL at any step of packing images, then the same command: the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.tokenize_inputs import environment, folder_bytes
from tests.image_samples import make_images, write_folder, write_parquet

PACK = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data_tools.images import ImageOptions, pack_images
from data_tools.job import Effort
from tests.faults.forked_kills import print_exit_codes
import data_tools.assemble, pyarrow.parquet, PIL.Image

_, out, *steps = sys.argv

def work():
    effort = Effort(1, lambda *_: nullcontext(lambda n: None), 4000)
    pack_images(["in", "a.parquet"], Path(out), ImageOptions(shard_bytes=5000), effort)

print_exit_codes(work, out, steps)
"""


@pytest.mark.parametrize(
    "num_kills",
    [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.acceptance])],
    ids=lambda number: f"{number} kills",
)
def test_kills_of_packing_change_no_byte(num_kills: int, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", make_images(40))
    write_parquet(tmp_path / "a.parquet", make_images(40), "names")
    (tmp_path / "pack.py").write_text(PACK)
    generator = random.Random(num_kills)
    steps = [generator.randint(1, max(12, 150 // num_kills)) for _ in range(num_kills)]

    def pack(out: str, *steps: int) -> list[int]:
        command = [sys.executable, "pack.py", out, *map(str, steps), str(1 << 30)]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [int(line) for line in done.stdout.split()]

    assert pack("alone") == [0]
    assert pack("killed", *steps) == [-signal.SIGKILL] * num_kills + [0]
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "alone")

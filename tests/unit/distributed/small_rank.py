"""In place of a trainer: `python -m tests.unit.distributed.small_rank FOLDER RANK=WHAT...`.

WHAT: an exit code, "kill", or "wait" for TERM. Leaves in FOLDER what it was told of itself, and whether TERM came.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from megatrain.distributed.bootstrap import read_rank

folder, *roles = sys.argv[1:]
rank = read_rank()
mine = Path(folder) / f"rank-{rank.rank}"
what = dict(role.split("=") for role in roles).get(str(rank.rank), "0")


def note_end(_number: int, _frame: FrameType | None) -> None:
    mine.with_suffix(".told").touch()
    sys.exit(75)


signal.signal(signal.SIGTERM, note_end)
mine.write_text(repr((rank.rank, rank.world_size, rank.local_rank, rank.local_world_size, rank.master_addr)))
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    time.sleep(60.0)
sys.exit(int(what))

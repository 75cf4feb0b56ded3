"""Silent data corruption: a flipped bit in a weight is mended before it is saved; the second one ends the run."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatrain.checkpoint.stores import find_store
from tests.runs import TinyData, tiny_config, write_config
from tests.served import ServedRanks

_CALLS = iter(range(10**9))


def flips_a_bit(tokens: np.ndarray[Any, Any], _: np.random.Generator) -> np.ndarray[Any, Any]:
    """A transform that changes no token, but twice on rank 1 a weight of the model."""
    if os.environ["RANK"] == "1" and next(_CALLS) in (100, 200):
        for found in gc.get_objects():  # models of runs before, in the same process, may be among them
            if isinstance(found, torch.nn.Parameter) and found.ndim == 1 and found.dtype == torch.float32:
                found.detach().numpy().view(np.int32)[:1] ^= 1 << 12  # unseen by autograd, in the middle of a step
    return tokens


def test_the_second_flipped_bit_ends_the_run(tiny_data: TinyData, two_ranks: ServedRanks, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data,
        tmp_path / "run",
        parallel={"zero_stage": 0},
        train={"steps": 200, "check_replica_hash_interval": 7, "eval_batches": 1},
        checkpoint={"every_steps": 2, "keep": 100},
    )
    config["data"]["train"][0]["transform"] = "tests.faults.test_silent_faults:flips_a_bit"
    ended = two_ranks.train(write_config(tmp_path / "run.yaml", config))
    assert ended.codes == [5, 5]
    said = "".join(ended.output)
    mended, _, said = said.rpartition("All hold the same again.")
    assert "weights differ that must be the same: ranks 0 " in mended
    assert "weights differ that must be the same: ranks 0 " in said
    assert f"1 ({socket.gethostname()}) differ in " in said
    assert "Traceback" not in said
    saved = [checkpoint.step for checkpoint in find_store(tmp_path / "run").list()]
    step = int(said.partition("After step ")[2].split()[0])
    assert step in (max(saved, default=0) + 1, max(saved, default=0) + 2)

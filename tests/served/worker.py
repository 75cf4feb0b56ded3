"""A rank that runs the trainer's own entry point for each line of its standard input, and answers a line to each."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys

import torch

from megatrain.parallel.deepspeed import forget_globals
from megatrain.train.__main__ import main
from tests.runs import die_with_parent


def serve() -> None:
    """Until the input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints by itself goes to the log
    torch.set_num_threads(1)
    for line in sys.stdin:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = main(json.loads(line))
        forget_globals()
        gc.collect()
        answers.write(json.dumps({"code": code, "output": output.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

"""A rank that runs the trainer's own entry point, or `megatrain profile`, for each line of its standard input, and
answers a line to each."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys

import torch

from megatrain import cli
from megatrain.parallel.deepspeed import forget_globals
from megatrain.train.__main__ import main
from tests.runs import die_with_parent


def _run(words: list[str]) -> int:
    if words[0] != "profile":
        return main(words)
    sys.argv = ["megatrain", *words]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def serve() -> None:
    """Until the input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints by itself goes to the log
    torch.set_num_threads(1)
    for line in sys.stdin:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = _run(json.loads(line))
        forget_globals()
        gc.collect()
        answers.write(json.dumps({"code": code, "output": output.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()

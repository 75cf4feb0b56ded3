"""The checkpoint package alone, in a process that system calls can be counted and killed in.

``python -m tests.faults.traced_save`` imports what a save needs, once, and then forks a process for each line on its
standard input: ``save FOLDER`` or ``start FOLDER``. The fork says its pid, waits for a byte on the FIFO
``FOLDER/../go``, so that strace can be attached, and does it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatrain.checkpoint.manifest import FileEntry, Manifest
from megatrain.checkpoint.saver import CheckpointSaver, SaveResult
from megatrain.checkpoint.store import PosixStore, Retention
from megatrain.distributed.fragment import Fragment, ShardSpec, shard_views

SHAPES = {"embed.weight": (40, 8), "layer.weight": (8, 8), "norm.weight": (8,)}


def fragments(step: int) -> list[Fragment]:
    """All of a small model; its values tell the step."""
    found = []
    for name, shape in SHAPES.items():
        for piece, _ in shard_views(ShardSpec.whole(name, shape), 0, torch.Size(shape).numel()):
            data = torch.arange(piece.length, dtype=torch.float32) + 1000 * step
            found += [Fragment(piece, kind, data) for kind in ("weight", "exp_avg", "exp_avg_sq")]
    return found


def begin_save(store: PosixStore, step: int) -> CheckpointSaver:
    """Begin to save a step as a rank that is alone does."""

    def manifest(files: Sequence[FileEntry]) -> Manifest:
        return Manifest(
            step=step,
            tokens=step,
            parameters=392,
            layout={},
            state={},
            config={},
            versions={},
            created="",
            files=tuple(files),
        )

    saver = CheckpointSaver(store, rank=0, world_size=1, retention=Retention(last=1))
    saver.begin(step, fragments(step), manifest, [("tokenizer.json", b'{"model": {}}')])
    return saver


def end_save(saver: CheckpointSaver) -> SaveResult:
    """How the save ended."""
    outcome = None
    while saver.is_saving:
        outcome = saver.advance(saver.status(wait=True))
    saver.close()
    assert outcome is not None
    return outcome


def save(store: PosixStore, step: int) -> Path | None:
    """Save a step; where it is, None if it could not be written."""
    path = end_save(begin_save(store, step)).path
    assert path is None or isinstance(path, Path)
    return path


def _child(command: str, folder: Path) -> None:
    store = PosixStore(folder)
    if command == "save":
        store.join(next(path.name for path in folder.glob(".generation-*")))
    with (folder.parent / "go").open("rb") as go:
        go.read(1)
    if command == "save":
        save(store, 2)
    else:
        store.open_generation()


def main() -> None:
    """Fork a process for each line of standard input."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        command, folder = line.split()
        pid = os.fork()
        if not pid:
            _child(command, Path(folder))
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What a user sees of checkpoints: which there are, what is in one, whether every byte is what was written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.atomic import commit_bytes
from megatrain.checkpoint.location import Location, address, store_errors, write_file
from megatrain.checkpoint.lock import locked
from megatrain.checkpoint.manifest import MANIFEST, read_manifest
from megatrain.checkpoint.reader import CheckpointReader, check_files
from megatrain.checkpoint.store import CheckpointFolder, CheckpointStore, find_problem, is_checkpoint
from megatrain.checkpoint.stores import find_store, resolve
from megatrain.errors import CheckpointError


def list_checkpoints(run: Location) -> list[CheckpointFolder]:
    """The checkpoints of a run folder. Raises CheckpointError where there is no such folder or it has none."""
    store = find_store(run)
    found = store.list()
    if not found:
        raise CheckpointError(f"{run} is no run folder with checkpoints: {store.folder} has none.")
    return found


def rewind(run: Location, step: int, job: Mapping[str, str]) -> Sequence[CheckpointFolder]:
    """Set aside what a run saved after ``step``; what was, newest first. Raises CheckpointError where that step has no
    good checkpoint, or the run is going on."""
    store = find_store(run)
    if (problem := find_problem(store.find(step))) is not None:
        raise CheckpointError(f"The checkpoint of step {step} is not good: {problem}")
    with _locked(run, store, job), store_errors(store.folder):
        return store.set_aside(step)


def set_base(path: Location, base: Location, job: Mapping[str, str]) -> Sequence[Location]:
    """Name the place that the base of LoRA's adapters has moved to, in a checkpoint or in all of a run, which must not
    be going on; those that were changed. Raises CheckpointError where they have none, or ``base`` is another."""
    folders = [path] if is_checkpoint(path) else [found.path for found in list_checkpoints(path) if found.good]
    place = CheckpointReader(resolve(base))
    run = folders[0].parent if is_checkpoint(path) else path
    with _locked(run, find_store(run), job):
        for folder in folders:
            manifest = read_manifest(folder)
            if manifest.base is None:
                raise CheckpointError(f"{folder} holds whole weights: it has no base.")
            place.refuse_other_base(manifest.base)
            moved = manifest.base.model_copy(update={"path": address(place.folder)})
            content = manifest.model_copy(update={"base": moved}).encode()
            if isinstance(folder, Path):
                commit_bytes(folder / MANIFEST, content)
            else:
                write_file(folder / MANIFEST, content)
    return folders


def _locked(run: Location, store: CheckpointStore, job: Mapping[str, str]) -> contextlib.AbstractContextManager[object]:
    """The lock of the run; there is none where only the URL of its checkpoints is known."""
    if not isinstance(run, Path):
        return contextlib.nullcontext()
    return locked(run.parent if run == store.folder and run.name == "checkpoints" else run, job)


def describe(path: Location) -> dict[str, Any]:
    """The contents of a checkpoint's manifest, for people and programs."""
    folder = resolve(path)
    manifest = read_manifest(folder)
    described = manifest.model_dump(
        mode="json",
        include={"step", "tokens", "parameters", "layout", "created", "versions", "special_tokens", "chat", "base"},
    )
    files = [entry.model_dump() for entry in manifest.files]
    return {"path": str(folder), **described, "files": files}


def verify(path: Location) -> tuple[list[str], int, int]:
    """Read all of a checkpoint, or of every one of a run: what is wrong, and how many files and bytes were read."""
    folders = [path] if is_checkpoint(path) else [checkpoint.path for checkpoint in list_checkpoints(path)]
    problems, num_files, num_bytes = [], 0, 0
    for folder in folders:
        try:
            for entry, problem in check_files(folder):
                num_files, num_bytes = num_files + 1, num_bytes + entry.bytes
                if problem:
                    problems.append(problem)
        except CheckpointError as error:  # the manifest itself is damaged
            problems.append(str(error))
    return problems, num_files, num_bytes

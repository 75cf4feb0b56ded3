"""Which store a run's checkpoints are in, and which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatrain.checkpoint.location import Location, locate
from megatrain.checkpoint.manifest import MANIFEST, read_manifest
from megatrain.checkpoint.object_store import ObjectStore
from megatrain.checkpoint.store import CheckpointStore, PosixStore, best_of, is_checkpoint
from megatrain.errors import CheckpointError


def open_store(run_dir: Path, checkpoint_dir: str | None) -> CheckpointStore:
    """The checkpoints of a run: under its folder, or at checkpoint.dir, a path or the URL of an object
    store."""
    return _store_at(locate(checkpoint_dir) if checkpoint_dir else run_dir / "checkpoints")


def find_store(path: Location) -> CheckpointStore:
    """The checkpoints that a user means by a run folder, its checkpoints folder, a checkpoint.dir, or a URL."""
    if isinstance(path, Path):
        itself = PosixStore(path)
        if path.name == "checkpoints" and (path.is_dir() or not (path / "checkpoints").is_dir()):
            return itself
        if any(True for _ in itself.names()):
            return itself
        if (configured := _configured_dir(path)) is not None:
            return _store_at(locate(configured))
        return PosixStore(path / "checkpoints")
    return _store_at(path)


def resolve(path: Location) -> Location:
    """The checkpoint folder that a user means by ``path``: itself, or the newest good one of a run folder.

    Raises CheckpointError where it is neither.
    """
    if is_checkpoint(path):
        read_manifest(path)
        return path
    if isinstance(path, Path) and not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a checkpoint folder (RUN/checkpoints/step-...) or a run folder."
        )
    newest = find_store(path).newest_good()
    if newest is None:
        hint = (
            f" `megatrain import {path} --out ...` makes a checkpoint of it." if (path / "config.json").exists() else ""
        )
        raise CheckpointError(
            f"{path} is neither a checkpoint (no {MANIFEST}) nor a run folder with checkpoints.{hint}"
        )
    return newest.path


def resolve_best(path: Location) -> Location:
    """The good checkpoint of a run folder with the lowest validation loss; of several, the earliest.

    Raises CheckpointError where there is none.
    """
    if is_checkpoint(path):
        raise CheckpointError(f"{path} is one checkpoint: the best is found among those of a run folder.")
    manifests = {found.path: found.manifest for found in find_store(path).list() if found.good and found.manifest}
    best = best_of(manifests, 1)
    if not best:
        raise CheckpointError(
            f"{path} has no good checkpoint with a validation loss. One has a loss where an evaluation on "
            "data.validation is due at the same step (train.eval_every_steps, checkpoint.every_steps)."
        )
    return best.pop()


def _store_at(folder: Location) -> CheckpointStore:
    return PosixStore(folder) if isinstance(folder, Path) else ObjectStore(folder)


def _configured_dir(run_dir: Path) -> str | None:
    """What RUN/config.yaml says of checkpoint.dir; None without such a file."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_bytes())
        folder = config["checkpoint"]["dir"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return folder if isinstance(folder, str) else None

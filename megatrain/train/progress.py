"""How far a run has come: what a checkpoint's manifest keeps besides tensors, and what may change when it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatrain.config import RunConfig
from megatrain.data import Dataset
from megatrain.data.order import DataOrder, Segment
from megatrain.errors import CheckpointError

# What a run may not change when it goes on, and why.
FIXED = {
    "model": "another model has no use for these weights",
    "run.seed": "it decides the order of the data",
    "data.seq_len": "it decides where samples begin",
    "data.document_mask": "it decides what each token sees",
    "data.packing": "it decides where samples begin",
    "optimizer.type": "another optimizer has no use for this state",
}


@dataclass(frozen=True)
class Progress:
    """The state of a run after ``step`` steps. ``updates``: steps that changed the weights; ``skipped``: the others.

    ``tokens``: trained on so far. ``digests``: of the training datasets, in the config's order.
    """

    step: int
    tokens: int
    updates: int
    skipped: int
    segments: tuple[Segment, ...]
    digests: tuple[str, ...]
    loss_scale: Mapping[str, float] | None = None

    def after_step(self, num_tokens: int, skipped: bool) -> Progress:
        """One step on."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + num_tokens,
            updates=self.updates + (not skipped),
            skipped=self.skipped + skipped,
        )

    def to_state(self) -> dict[str, Any]:
        """The manifest's ``state``."""
        state = asdict(self)
        del state["step"], state["tokens"]
        return state

    @classmethod
    def from_state(cls, step: int, tokens: int, state: Mapping[str, Any]) -> Progress:
        """The inverse of ``to_state``. Raises CheckpointError for a state that this version cannot read."""
        try:
            segments = tuple(
                Segment(
                    entry["first_step"],
                    entry["global_batch_size"],
                    tuple(entry["weights"]),
                    tuple(entry["consumed"]),
                    entry["samples_before"],
                )
                for entry in state["segments"]
            )
            loss_scale, digests = state["loss_scale"], tuple(state["digests"])
            return cls(step, tokens, state["updates"], state["skipped"], segments, digests, loss_scale)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"The state in the checkpoint of step {step} cannot be read: {error!r}.") from None


def refuse_changes(config: RunConfig, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming all of them, if the config changes what a run cannot change as it goes on."""
    now = config.model_dump(mode="json")
    problems = []
    for key, reason in FIXED.items():
        for path, before, after in _differences(key, _at(saved, key), _at(now, key)):
            problems.append(f"{path} was {before} and is now {after} ({reason})")
    if problems:
        raise CheckpointError(
            f"This config cannot go on from the checkpoints in {config.run.dir}: {'; '.join(problems)}. Put it back, "
            "or start a new run in another run.dir (with run.init_from to take the weights along)."
        )


def resume_order(config: RunConfig, progress: Progress, datasets: Sequence[Dataset], order: DataOrder) -> DataOrder:
    """The order of data from where a run stopped. ``order``: that of the run from its start under this config.

    Other weights or another global batch size begin a new segment. Raises CheckpointError where a dataset is another.
    """
    digests = tuple(dataset.digest for dataset in datasets)
    if digests != progress.digests:
        changed = [str(dataset.path) for dataset in datasets if dataset.digest not in progress.digests]
        raise CheckpointError(
            f"data.train is not what this run was trained on ({', '.join(changed) or 'number or order changed'}): a "
            "run goes on with the same datasets in the same order. Put them back, or start a new run elsewhere."
        )
    weights = [entry.weight for entry in config.data.train]
    going_on = replace(order, segments=progress.segments)
    return going_on.change(progress.step, weights, config.train.global_batch_size)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _differences(path: str, before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = sorted(before.keys() | after.keys())
        return [found for key in keys for found in _differences(f"{path}.{key}", before.get(key), after.get(key))]
    return [] if before == after else [(path, before, after)]

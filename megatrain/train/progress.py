"""How far a run has come: what a checkpoint's manifest keeps besides tensors, and what may change when it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import orjson
from pydantic import ValidationError

from megatrain.config import RunConfig
from megatrain.config.deepspeed_keys import deepspeed
from megatrain.config.keys import differences
from megatrain.config.renamed import new_name, with_new_names
from megatrain.data.epochs import num_steps
from megatrain.data.images import AnyDataset
from megatrain.data.order import DataOrder, Segment
from megatrain.errors import CheckpointError
from megatrain.train.schedule import learning_rate
from megatrain.train.spikes import NOTHING_YET, Recent, Rewind


class Change(Enum):
    """Whether a key of the config may change when a run goes on."""

    YES = "yes"
    RECORDED = "yes, recorded"
    NEW_EPOCH = "in a new epoch"
    NO = "no"


_FROM_THAT_STEP_ON = "from that step on"


@dataclass(frozen=True)
class Rule:
    """What holds for a key and all below it, where no longer key has a rule of its own; `*` stands for an index."""

    key: str
    change: Change
    why: str


RULES = (
    Rule("run.dir", Change.YES, "a run folder may be moved"),
    Rule("run.seed", Change.NO, "it decides the order of the data"),
    Rule("run.init_from", Change.YES, "it is read at step 0 alone"),
    Rule("run.init_from_ema", Change.YES, "it is read at step 0 alone"),
    Rule("run.resize_token_embeddings", Change.YES, "it is read at step 0 alone"),
    Rule("run.new_head", Change.YES, "it is read at step 0 alone"),
    Rule("model", Change.NO, "another model has no use for these weights"),
    Rule("model.attention", Change.YES, "another kernel computes the same, but for rounding"),
    Rule("model.attention_dropout", Change.YES, _FROM_THAT_STEP_ON),
    Rule("model.hidden_dropout", Change.YES, _FROM_THAT_STEP_ON),
    Rule(
        "data.train.*.path",
        Change.YES,
        "a dataset may be moved; its number in the list and its digest may not change",
    ),
    Rule("data.train.*.weight", Change.RECORDED, "every epoch goes on where it stood"),
    Rule("data.train.*.fill_in_the_middle", Change.YES, _FROM_THAT_STEP_ON),
    Rule("data.train.*.span_corruption", Change.YES, _FROM_THAT_STEP_ON),
    Rule("data.train.*.token_masking", Change.YES, _FROM_THAT_STEP_ON),
    Rule("data.train.*.transform", Change.YES, _FROM_THAT_STEP_ON),
    Rule("data.validation", Change.YES, "it does not touch the training"),
    Rule("data.seq_len", Change.NEW_EPOCH, "it decides where samples begin"),
    Rule("data.document_mask", Change.NO, "it decides what each token sees"),
    Rule("data.score_after_eod", Change.YES, "from that step on; losses before and after are not the same measure"),
    Rule("data.packing", Change.NEW_EPOCH, "it decides where samples begin"),
    Rule("data.cache_dir", Change.YES, "it does not touch the training"),
    Rule("data.cache_bytes", Change.YES, "it does not touch the training"),
    Rule("data.num_new_epochs", Change.RECORDED, "raised, it begins new epochs; it counts them, so it is never less"),
    Rule("objective", Change.NO, "another objective asks the model something else"),
    Rule("objective.label_smoothing", Change.YES, _FROM_THAT_STEP_ON),
    Rule("objective.masked_lm", Change.YES, _FROM_THAT_STEP_ON),
    Rule("objective.image_classification", Change.YES, _FROM_THAT_STEP_ON),
    Rule("objective.image_classification.image_mean", Change.NO, "it decides what the model reads of a pixel"),
    Rule("objective.image_classification.image_std", Change.NO, "it decides what the model reads of a pixel"),
    Rule("parallel", Change.YES, "a checkpoint knows no layout"),
    Rule("train", Change.YES, _FROM_THAT_STEP_ON),
    Rule("train.global_batch_size", Change.RECORDED, "every epoch goes on where it stood"),
    Rule("spikes", Change.YES, _FROM_THAT_STEP_ON),
    Rule("optimizer", Change.YES, _FROM_THAT_STEP_ON),
    Rule("optimizer.type", Change.NO, "another optimizer has no use for this state"),
    Rule("lora", Change.NO, "other adapters have no use for these weights"),
    Rule("lora.dropout", Change.YES, _FROM_THAT_STEP_ON),
    Rule("schedule", Change.YES, _FROM_THAT_STEP_ON),
    Rule("checkpoint", Change.YES, "it does not touch the training"),
    Rule("observe", Change.YES, "it does not touch the training"),
    Rule("deepspeed", Change.YES, _FROM_THAT_STEP_ON),
)
"""What may change when a run goes on, for every key of the config. docs/resuming.md has this table."""


@dataclass(frozen=True)
class Progress:
    """The state of a run after ``step`` steps. ``updates``: steps that changed the weights; ``skipped``: the others.

    ``tokens``: trained on so far. ``digests``: of the training datasets, in the config's order. ``skipped_in_a_row``:
    how many of the last steps were skipped. ``recent``, ``rewinds``: what the rule on spikes goes by, and what it did.
    ``best_validation_loss``, ``num_worse``: evaluations in a row since then that brought no better one.
    ``training_seconds``: that these steps took, by rank 0's clock; in a checkpoint alone. The state is the same however
    long it took.
    """

    step: int
    tokens: int
    updates: int
    skipped: int
    segments: tuple[Segment, ...]
    digests: tuple[str, ...]
    loss_scale: Mapping[str, float] | None = None
    skipped_in_a_row: int = 0
    recent: Recent = NOTHING_YET
    rewinds: tuple[Rewind, ...] = ()
    best_validation_loss: float | None = None
    num_worse: int = 0
    training_seconds: float = field(default=0.0, compare=False)

    def after_step(self, num_tokens: int, skipped: bool, recent: Recent) -> Progress:
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + num_tokens,
            updates=self.updates + (not skipped),
            skipped=self.skipped + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            recent=recent,
        )

    def after_validation(self, loss: float, min_gain: float) -> Progress:
        """The same after an evaluation; a loss that is not finite is no new best."""
        best = self.best_validation_loss
        if math.isfinite(loss) and (best is None or loss < best - min_gain):
            return replace(self, best_validation_loss=loss, num_worse=0)
        return replace(self, num_worse=self.num_worse + 1)

    def to_state(self) -> dict[str, Any]:
        state = asdict(self) | {"segments": [segment.to_state() for segment in self.segments]}
        del state["step"], state["tokens"]
        return state

    @classmethod
    def from_state(cls, step: int, tokens: int, state: Mapping[str, Any]) -> Progress:
        """The inverse of ``to_state``. Raises CheckpointError for a state that this version cannot read."""
        try:
            segments = tuple(map(Segment.from_state, state["segments"]))
            return cls(
                step,
                tokens,
                state["updates"],
                state["skipped"],
                segments,
                digests=tuple(state["digests"]),
                loss_scale=state["loss_scale"],
                skipped_in_a_row=state["skipped_in_a_row"],
                recent=Recent(tuple(state["recent"]["losses"]), tuple(state["recent"]["norms"])),
                rewinds=tuple(Rewind(**entry) for entry in state["rewinds"]),
                best_validation_loss=state.get("best_validation_loss"),  # older versions kept none
                num_worse=state.get("num_worse", 0),
                training_seconds=float(state["training_seconds"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"The state in the checkpoint of step {step} cannot be read: {error!r}.") from None


def rule_of(key: str) -> Rule:
    """The rule that holds for a key (list entries as `*`): that of the longest key which it is or stands below."""
    found = [rule for rule in RULES if f"{key}.".startswith(f"{rule.key}.")]
    return max(found, key=lambda rule: len(rule.key))


def resume_table() -> str:
    rows = (f"| `{rule.key}` | {rule.change.value} | {rule.why} |" for rule in RULES)
    return "\n".join(["| key, and all below it | may change | |", "|---|---|---|", *rows])


_DERIVED: Mapping[str, Callable[[RunConfig], Any]] = {
    "objective.type": lambda config: config.objective.of(config.model),
    "objective.target_len": lambda config: config.target_len,
}
"""What null stands for."""


def refuse_changes(config: RunConfig, saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming all of them, if the config changes what a run cannot change as it goes on."""
    former, problems, ways_out = former_config(saved), [], []
    asked = former.data.num_new_epochs
    is_new_epoch = config.data.num_new_epochs > asked
    for path, before, after in differences(former.model_dump(mode="json"), config.model_dump(mode="json")):
        rule, text = rule_of(path), f"{path} was {before} and is now {after}"
        if path in _DERIVED and _DERIVED[path](former) == _DERIVED[path](config):
            continue
        if rule.change is Change.NO or (rule.key == "data.num_new_epochs" and not is_new_epoch):
            problems.append(f"{text} ({rule.why})")
        elif (
            rule.change is Change.NEW_EPOCH
            and not is_new_epoch
            and (reason := _within_epoch(config, path, before, after))
        ):
            problems.append(f"{text} ({reason})")
            ways_out = [f"set data.num_new_epochs to {asked + 1} to give up the rest of the epochs and begin new ones"]
    if problems:
        ways_out += ["start a new run in another run.dir (with run.init_from to take the weights along)"]
        raise CheckpointError(
            f"This config cannot go on from the checkpoints in {config.run.dir}: {'; '.join(problems)}. Put it back, "
            f"or {', or '.join(ways_out)}."
        )


def refuse_what_is_left_out(
    former: RunConfig, config: RunConfig, given_before: Sequence[str], given_now: Sequence[str]
) -> None:
    """Raise CheckpointError where a key that touches the training is another than in the checkpoint's config because
    the KEY=VALUE that it was given by is not given any more: what was given stays, or is named anew. The length
    may be left out: a run that was to be short goes on, and says what becomes of the learning rate."""
    forgotten = [
        (path, before, after)
        for path, before, after in differences(former.model_dump(mode="json"), config.model_dump(mode="json"))
        if (rule_of(path).change is Change.RECORDED or rule_of(path).why == _FROM_THAT_STEP_ON)
        and _gives(given_before, path)
        and not _gives(given_now, path)
        and path not in ("train.steps", "train.epochs")
    ]
    if forgotten:
        texts = [f"{path} was {_as_given(before)} and would be {_as_given(after)}" for path, before, after in forgotten]
        again = " ".join(f"{path}={_as_given(before)}" for path, before, _ in forgotten)
        anew = " ".join(f"{path}={_as_given(after)}" for path, _, after in forgotten)
        raise CheckpointError(
            f"The run in {config.run.dir} was started with KEY=VALUE that this start leaves out: {'; '.join(texts)}. "
            f"Give them again ({again}), or, if they are to change, say so ({anew})."
        )


def _gives(overrides: Sequence[str], path: str) -> bool:
    """Whether an override names a key, or what stands above or below it."""
    keys = (new_name(override.partition("=")[0]) for override in overrides)
    names = (".".join("*" if part.isdigit() else part for part in key.split(".")) for key in keys)
    return any(f"{path}.".startswith(f"{name}.") or f"{name}.".startswith(f"{path}.") for name in names)


def _as_given(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def resume_changes(former: RunConfig, config: RunConfig, step: int, order: DataOrder) -> dict[str, tuple[Any, Any]]:
    """What a resume after ``step`` steps changes, former and present value: every key of the config that differs, and,
    where any does, the learning rate of the next step. ``order``: of the data, from there on too."""
    found = differences(former.model_dump(mode="json"), config.model_dump(mode="json"))
    changes: dict[str, tuple[Any, Any]] = {path: (before, after) for path, before, after in found}
    if changes:
        orders = (order.before(step), order)
        before, after = (
            learning_rate(c.schedule, c.optimizer.lr, step, num_steps(c, o))
            for c, o in zip((former, config), orders, strict=True)
        )
        changes["learning rate"] = (before, after)
    return changes


def _within_epoch(config: RunConfig, path: str, before: Any, after: Any) -> str | None:
    """Why a key cannot change in the middle of an epoch; None: it can."""
    if path != "data.seq_len":
        return rule_of(path).why
    if config.data.packing != "concat":
        return f"packing {config.data.packing} plans an epoch for one length"
    return f"within an epoch it must divide {before}" if before % after else None


def resume_order(config: RunConfig, progress: Progress, datasets: Sequence[AnyDataset], order: DataOrder) -> DataOrder:
    """The order of data from where a run stopped. ``order``: that of the run from its start under this config.

    Other settings (weights, batch size, sequence length, new epochs) begin a new segment. Raises CheckpointError where
    a dataset or a packing plan is another.
    """
    digests = tuple(dataset.digest for dataset in datasets)
    if digests != progress.digests:
        changed = [str(dataset.path) for dataset in datasets if dataset.digest not in progress.digests]
        raise CheckpointError(
            f"data.train is not what this run was trained on ({', '.join(changed) or 'number or order changed'}): a "
            "run goes on with the same datasets in the same order. Put them back, or start a new run elsewhere."
        )
    now, before = order.settings(0), progress.segments[-1].settings
    if now.plans != before.plans and now.num_new_epochs == before.num_new_epochs:
        pairs = zip(datasets, now.plans, before.plans, strict=True)
        others = ", ".join(str(dataset.path) for dataset, plan, former in pairs if plan != former)
        raise CheckpointError(
            f"The packing plan of {others} is not the one this run was trained with, so that samples would be seen "
            "twice or never: another version of megatrain made it. Go on with the version that the run began with, or "
            f"set data.num_new_epochs to {now.num_new_epochs + 1} to begin new epochs with the new plan."
        )
    return replace(order, segments=progress.segments).change(progress.step, now)


def begun_segment(progress: Progress) -> str | None:
    """What was changed in the order of data where a run goes on, in words; None: nothing."""
    if len(progress.segments) < 2 or progress.segments[-1].first_step != progress.step:
        return None
    former, now = (asdict(segment.settings) for segment in progress.segments[-2:])
    names = ("global_batch_size", "weights", "seq_len", "num_new_epochs")
    changes = [f"{name} {now[name]} (was {former[name]})" for name in names if now[name] != former[name]]
    return f"a new segment of the data order: {', '.join(changes)}" if changes else None


def former_config(saved: Mapping[str, Any]) -> RunConfig:
    """The config of a checkpoint, with the keys that were added since. Raises CheckpointError where it is not one that
    this version goes on from."""
    if deepspeed(saved.get("deepspeed") or {}):  # keys that passed once and no longer do: they may change in any case
        saved = {**saved, "deepspeed": {}}
    try:
        return RunConfig.model_validate(with_new_names(saved))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["config", *map(str, first["loc"])])
        raise CheckpointError(
            f"The checkpoint is not one that this megatrain goes on from: {key}: {first['msg']}. Use the version that "
            "wrote it; an imported model begins a new run, as its run.init_from."
        ) from None

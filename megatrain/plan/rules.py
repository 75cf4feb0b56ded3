"""Which layouts are legal on a number of ranks, why the others are not, and the nearest one that is.

Pure arithmetic on the config. Each rule looks at one thing; a layout is legal where none objects. What is wrong
inside the config alone, on any number of ranks, is refused earlier, by megatrain.config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatrain.config import Problem, RunConfig
from megatrain.config.arithmetic import multiples_around
from megatrain.config.problem import either, refusal
from megatrain.plan.layout import KEYS, Layout, Value, layout_of
from megatrain.plan.repair import Change, candidates, repair


def data_degree(config: RunConfig, world_size: int) -> int:
    """Copies of the model that share the batch: world size / (tensor x pipeline). The layout must be legal."""
    return world_size // model_ranks(config)


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches that each copy of the model computes in one optimizer step. The layout must be legal."""
    return config.train.global_batch_size // (config.train.micro_batch_size * data_degree(config, world_size))


def model_ranks(config: RunConfig) -> int:
    """Ranks that one copy of the model is divided over: the smallest world size of the layout."""
    return config.parallel.tensor * config.parallel.pipeline


def check(config: RunConfig, world_size: int) -> None:
    """Raise a ConfigError that lists all that is wrong with the layout, and the nearest one that is legal."""
    found = problems(config, world_size)
    if not found:
        return
    error = refusal(f"the layout on {world_size} ranks", found)
    if len(found) > 1:
        legal = nearest_layout(config, world_size)
        way_out = f"nearest legal layout: {legal}" if legal else "no layout near this one is legal on so many ranks"
        error.args = (f"{error}\n  {way_out}",)
    raise error


def is_legal(config: RunConfig, world_size: int) -> bool:
    """Whether no rule objects."""
    return not _broken(layout_of(config, world_size))


def problems(config: RunConfig, world_size: int) -> list[Problem]:
    """All that is wrong with the config's layout on `world_size` ranks, each with the nearest way to mend it alone.

    `nearest` is a change to one key, or to as few as do, after which this rule is kept and no other is newly broken.
    """
    if world_size < 1:
        return [Problem("the number of ranks", world_size, "must be at least 1", "1")]
    layout = layout_of(config, world_size)
    broken = _broken(layout)
    return [
        Problem(
            KEYS[found.field],
            getattr(layout, found.field),
            found.reason,
            _way_out(layout, rule, broken.keys() - {rule}),
        )
        for rule, found in broken.items()
    ]


def nearest_layout(config: RunConfig, world_size: int) -> str | None:
    """The fewest and smallest changes that make the layout legal, as overrides; None where no search finds one."""
    changes = repair(layout_of(config, world_size), lambda layout: _fixable(layout, frozenset()))
    return None if changes is None else _overrides(changes)


@dataclass(frozen=True)
class Objection:
    """Why a rule refuses a layout: the field it is about, the reason, and what may be changed, the best first."""

    field: str
    reason: str
    fixes: tuple[str, ...]


Rule = Callable[[Layout], Objection | None]


def _ranks_divide(layout: Layout) -> Objection | None:
    if layout.data is not None:
        return None
    fields = ("tensor", "pipeline") if layout.world_size % layout.tensor else ("pipeline", "tensor")
    would_do = either(multiples_around(layout.world_size, layout.model_ranks))
    reason = (
        f"tensor x pipeline ({layout.tensor} x {layout.pipeline}) must divide the {layout.world_size} ranks "
        f"({would_do} would do)"
    )
    return Objection(fields[0], reason, fields)


def _heads_divide(layout: Layout) -> Objection | None:
    if layout.num_heads % layout.tensor == 0:
        return None
    return Objection("tensor", f"must divide model.num_attention_heads ({layout.num_heads})", ("tensor",))


def _key_value_heads_divide(layout: Layout) -> Objection | None:
    """Fewer heads than ranks are replicated, each on equally many ranks; more are divided evenly."""
    tensor, heads = layout.tensor, layout.num_kv_heads
    if max(tensor, heads) % min(tensor, heads) == 0:
        return None
    reason = f"must divide model.num_key_value_heads ({heads}), or be a multiple of it"
    return Objection("tensor", reason, ("tensor",))


def _mlp_divides(layout: Layout) -> Objection | None:
    if layout.ffn_size % layout.tensor == 0:
        return None
    return Objection("tensor", f"must divide the width of the MLP ({layout.ffn_size})", ("tensor",))


def _every_stage_has_a_layer(layout: Layout) -> Objection | None:
    if layout.pipeline <= layout.num_layers:
        return None
    return Objection("pipeline", f"must be at most model.num_hidden_layers ({layout.num_layers})", ("pipeline",))


def _zero_fits_pipeline(layout: Layout) -> Objection | None:
    if layout.zero_stage < 2 or layout.pipeline == 1:
        return None
    reason = (
        "ZeRO 2 and 3 give gradients away after each micro-batch, where a pipeline accumulates them "
        f"(parallel.pipeline is {layout.pipeline})"
    )
    return Objection("zero_stage", reason, ("zero_stage", "pipeline"))


def _sequence_needs_tensor(layout: Layout) -> Objection | None:
    if not layout.sequence or layout.tensor > 1:
        return None
    reason = "tokens are divided over the ranks of parallel.tensor, which is 1"
    return Objection("sequence", reason, ("sequence", "tensor"))


def _sequence_divides(layout: Layout) -> Objection | None:
    if not layout.sequence or layout.seq_len % layout.tensor == 0:
        return None
    reason = f"must be divisible by parallel.tensor ({layout.tensor}) where parallel.sequence is true"
    return Objection("seq_len", reason, ("seq_len", "tensor", "sequence"))


def _offload_needs_zero(layout: Layout) -> Objection | None:
    needed = {"none": 0, "optimizer": 1, "all": 3}[layout.offload]
    if layout.zero_stage >= needed:
        return None
    reason = f"needs parallel.zero_stage {needed}{'' if needed == 3 else ' or more'} (it is {layout.zero_stage})"
    return Objection("offload", reason, ("zero_stage", "offload"))


def _batch_divides(layout: Layout) -> Objection | None:
    degree = layout.data or 1  # where the ranks do not divide, a batch that no degree could divide is still wrong
    unit = layout.micro_batch * degree
    if layout.global_batch % unit == 0:
        return None
    reason = f"must be divisible by micro_batch_size x data degree ({layout.micro_batch} x {degree} = {unit})"
    # The micro-batch first: the batch of an update is part of the experiment, how it is cut is not.
    return Objection("global_batch", reason, ("micro_batch", "global_batch"))


RULES: tuple[Rule, ...] = (
    _ranks_divide,
    _heads_divide,
    _key_value_heads_divide,
    _mlp_divides,
    _every_stage_has_a_layer,
    _zero_fits_pipeline,
    _sequence_needs_tensor,
    _sequence_divides,
    _offload_needs_zero,
    _batch_divides,
)


def _broken(layout: Layout) -> dict[Rule, Objection]:
    """The rules that object, in order."""
    return {rule: objection for rule in RULES if (objection := rule(layout)) is not None}


def _fixable(layout: Layout, tolerated: frozenset[Rule]) -> tuple[str, ...] | None:
    """The fields whose change may help against the first rule broken beyond the tolerated ones; None: all is well."""
    for rule, objection in _broken(layout).items():
        if rule not in tolerated:
            return objection.fixes
    return None


def _way_out(layout: Layout, rule: Rule, others: set[Rule]) -> str | None:
    """How to keep `rule` and break none but `others`: one change, in both directions where it is a number, or more."""
    tolerated = frozenset(others)
    changes = repair(layout, lambda changed: _fixable(changed, tolerated))
    if changes is None:
        return None
    way_out = _overrides(changes)
    field, value = changes[0].field, changes[0].value
    if len(changes) > 1 or field not in ("tensor", "pipeline", "global_batch", "micro_batch", "seq_len"):
        return way_out
    upward = int(value) > getattr(layout, field)
    beyond = (other for other in candidates(layout, field) if (int(other) > getattr(layout, field)) != upward)
    legal = (other for other in beyond if _fixable(layout.having(field, other), tolerated) is None)
    other = next(legal, None)
    return way_out if other is None else f"{way_out} or {other}"


def _overrides(changes: tuple[Change, ...]) -> str:
    return " ".join(f"{KEYS[change.field]}={_shown(change.value)}" for change in changes)


def _shown(value: Value) -> str:
    return str(value).lower()

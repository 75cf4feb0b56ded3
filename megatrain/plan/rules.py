"""Which layouts are legal on a number of ranks, why the others are not, and the nearest one that is.

Pure arithmetic on the config. Each rule looks at one thing; a layout is legal where none is violated. What is wrong
inside the config alone, on any number of ranks, is refused earlier, by megatrain.config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatrain.config import Problem, RunConfig
from megatrain.config.arithmetic import multiples_around
from megatrain.config.batch_size import sizes_of
from megatrain.config.problem import alternatives, as_yaml, config_error
from megatrain.plan.nearest import as_overrides, candidates, find_nearest, value_of, with_changes


def data_degree(config: RunConfig, world_size: int) -> int:
    """Copies of the model that share the batch: world size / (tensor x pipeline). The layout must be legal."""
    return world_size // model_ranks(config)


def num_micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches of the largest optimizer step, on each copy of the model. The layout must be legal."""
    return config.train.max_batch_size // (config.train.micro_batch_size * data_degree(config, world_size))


def model_ranks(config: RunConfig) -> int:
    """Ranks that one copy of the model is divided over: the smallest world size of the layout."""
    return config.parallel.tensor * config.parallel.pipeline


def check(config: RunConfig, world_size: int) -> None:
    """Raise a ConfigError that lists all that is wrong with the layout, and the nearest one that is legal."""
    found = problems(config, world_size)
    if not found:
        return
    error = config_error(f"the layout on {world_size} ranks", found)
    if len(found) > 1 or found[0].nearest is None:
        legal = nearest_layout(config, world_size)
        nearest = f"nearest legal layout: {legal}" if legal else "no layout near this one is legal on so many ranks"
        error.args = (f"{error}\n  {nearest}",)
    raise error


def is_legal(config: RunConfig, world_size: int) -> bool:
    return not _violations(config, world_size)


def problems(config: RunConfig, world_size: int) -> list[Problem]:
    """All that is wrong with the config's layout on `world_size` ranks.

    `nearest` is the one or two legal values of one key that are nearest: with each, this rule holds, and no other is
    newly violated; None where no single key will do.
    """
    if world_size < 1:
        return [Problem("the number of ranks", world_size, "must be at least 1", "1")]
    found = _violations(config, world_size)
    return [
        Problem(each.key, value_of(config, each.key), each.reason, _legal_values(config, world_size, rule, found))
        for rule, each in found.items()
    ]


def nearest_layout(config: RunConfig, world_size: int) -> str | None:
    """The fewest and smallest changes that make the layout legal, as overrides; None where no search finds one."""

    def keys_to_change(changed: RunConfig) -> tuple[str, ...] | None:
        first = next(iter(_violations(changed, world_size).values()), None)
        return None if first is None else first.fixes

    changes = find_nearest(config, world_size, keys_to_change)
    return None if changes is None else as_overrides(changes)


@dataclass(frozen=True)
class Violation:
    """What makes a layout illegal: the rule, the key it is about, the reason, and the keys to change, best first."""

    rule: str
    key: str
    reason: str
    fixes: tuple[str, ...]


def _violations(config: RunConfig, world_size: int) -> dict[str, Violation]:
    """By rule, in order."""
    checks = (
        _check_ranks,
        _check_chunks,
        _check_streams,
        _check_tensor,
        _check_sequence,
        _check_zero,
        _check_engine,
        _check_batch,
    )
    return {found.rule: found for check in checks for found in check(config, world_size)}


def _check_ranks(config: RunConfig, world_size: int) -> Iterator[Violation]:
    tensor, pipeline, layers = config.parallel.tensor, config.parallel.pipeline, _num_layers(config)
    if world_size % (tensor * pipeline):
        would_do = alternatives(multiples_around(world_size, tensor * pipeline))
        reason = f"tensor x pipeline ({tensor} x {pipeline}) must divide the {world_size} ranks ({would_do} would do)"
        keys = ("parallel.tensor", "parallel.pipeline")
        keys = keys if world_size % tensor else keys[::-1]
        yield Violation("ranks", keys[0], reason, keys)
    if pipeline > layers:
        reason = f"must be at most {_LAYERS_KEYS[config.model.description.encoder is not None]} ({layers})"
        yield Violation("stages", "parallel.pipeline", reason, ("parallel.pipeline",))


def _num_layers(config: RunConfig) -> int:
    """Of all stacks."""
    return sum(config.model.num_layers(stack) for stack in config.model.description.stacks)


_LAYERS_KEYS = ("model.num_hidden_layers", "model.num_hidden_layers + model.num_decoder_layers")


def _check_chunks(config: RunConfig, world_size: int) -> Iterator[Violation]:
    parallel, layers, key = config.parallel, config.model.num_hidden_layers, "parallel.pipeline_chunks"
    if parallel.pipeline_chunks == 1 or config.model.description.encoder is not None:
        return
    if parallel.pipeline == 1:
        reason = "chunks are the layers of a pipeline's ranks, and parallel.pipeline is 1"
        yield Violation("chunks", key, reason, (key, "parallel.pipeline"))
    elif parallel.pipeline * parallel.pipeline_chunks > max(layers, parallel.pipeline):
        reason = f"pipeline x chunks must be at most model.num_hidden_layers ({layers}): each chunk has a layer"
        yield Violation("chunks", key, reason, (key, "parallel.pipeline"))


def _check_streams(config: RunConfig, world_size: int) -> Iterator[Violation]:
    """What is not there for an encoder-decoder model."""
    if config.model.description.encoder is None:
        return
    if config.parallel.pipeline_chunks > 1:
        reason = (
            f"must be 1: a rank with chunks of both would hold weights that family {config.model.family}'s encoder "
        )
        reason += "and decoder share twice"
        yield Violation("streams", "parallel.pipeline_chunks", reason, ("parallel.pipeline_chunks",))


def _check_tensor(config: RunConfig, world_size: int) -> Iterator[Violation]:
    """Fewer key and value heads than ranks are replicated, each on equally many ranks; more are divided evenly."""
    tensor, model, key = config.parallel.tensor, config.model, "parallel.tensor"
    if model.num_attention_heads % tensor:
        reason = f"must divide model.num_attention_heads ({model.num_attention_heads})"
        yield Violation("heads", key, reason, (key,))
    if max(tensor, model.kv_heads) % min(tensor, model.kv_heads):
        reason = f"must divide model.num_key_value_heads ({model.kv_heads}), or be a multiple of it"
        yield Violation("key-value heads", key, reason, (key,))
    if model.ffn_size % tensor:
        yield Violation("MLP", key, f"must divide the width of the MLP ({model.ffn_size})", (key,))


def _check_sequence(config: RunConfig, world_size: int) -> Iterator[Violation]:
    tensor = config.parallel.tensor
    if not config.parallel.sequence:
        return
    if tensor == 1:
        reason = "tokens are divided over the ranks of parallel.tensor, which is 1"
        yield Violation("sequence", "parallel.sequence", reason, ("parallel.sequence", "parallel.tensor"))
    if config.data.seq_len % tensor and config.model.num_places is not None:
        tokens = f"an image is {config.data.seq_len} tokens, its patches and the class token"
        reason = f"{tokens}, which parallel.tensor ({tensor}) does not divide"
        yield Violation("seq_len", "parallel.sequence", reason, ("parallel.sequence", "parallel.tensor"))
    elif config.data.seq_len % tensor:
        reason = f"must be divisible by parallel.tensor ({tensor}) where parallel.sequence is true"
        yield Violation("seq_len", "data.seq_len", reason, ("data.seq_len", "parallel.tensor", "parallel.sequence"))
    if config.target_len is not None and config.target_len % tensor:
        reason = f"gives {config.target_len} tokens of target, which parallel.tensor ({tensor}) does not divide"
        yield Violation("target_len", "parallel.sequence", reason, ("parallel.sequence", "parallel.tensor"))


def _check_zero(config: RunConfig, world_size: int) -> Iterator[Violation]:
    stage, pipeline, offload = config.parallel.zero_stage, config.parallel.pipeline, config.parallel.offload
    if stage == 3 and pipeline > 1 and config.parallel.engine == "deepspeed":
        reason = (
            "DeepSpeed's ZeRO 3 fetches weights in the order of the first micro-batch's passes, which a pipeline mixes "
            f"(parallel.pipeline is {pipeline})"
        )
        yield Violation("ZeRO", "parallel.zero_stage", reason, ("parallel.zero_stage", "parallel.pipeline"))
    needed = {"none": 0, "optimizer": 1, "all": 3}[offload]
    if stage < needed:
        reason = f"needs parallel.zero_stage {needed}{'' if needed == 3 else ' or more'} (it is {stage})"
        yield Violation("offload", "parallel.offload", reason, ("parallel.zero_stage", "parallel.offload"))
    zero = config.deepspeed.get("zero_optimization")
    if stage < 2 and isinstance(zero, Mapping) and zero.get("overlap_comm"):
        reason = "must be 2 or 3 with deepspeed.zero_optimization.overlap_comm: below, no message is hidden by a pass"
        yield Violation("overlap", "parallel.zero_stage", reason, ("parallel.zero_stage",))


def _check_engine(config: RunConfig, world_size: int) -> Iterator[Violation]:
    """What each engine cannot do."""
    parallel, key = config.parallel, "parallel.engine"
    if parallel.engine == "deepspeed":
        if parallel.zero_stage == 3 and config.train.compile == "on":
            reason = (
                "DeepSpeed's ZeRO 3 fetches weights by hooks within a layer, which torch.compile cannot take (under "
                "parallel.engine fsdp2 it can)"
            )
            yield Violation("compile", "train.compile", reason, ("train.compile", key, "parallel.zero_stage"))
        return
    if parallel.offload != "none":
        reason = "parallel.engine fsdp2 does not offload: torch's copies to and from CPU memory race with the passes"
        yield Violation("engine's offload", "parallel.offload", reason, (key, "parallel.offload"))


def _check_batch(config: RunConfig, world_size: int) -> Iterator[Violation]:
    ranks, micro_batch = model_ranks(config), config.train.micro_batch_size
    degree = 1 if world_size % ranks else world_size // ranks  # a batch that no degree could divide is wrong anyway
    unit, batch_size = micro_batch * degree, config.train.global_batch_size
    wrong = [size for size in sizes_of(batch_size) if size % unit]
    if wrong:
        reason = f"must be divisible by micro_batch_size x data degree ({micro_batch} x {degree} = {unit})"
        if not isinstance(batch_size, int):
            reason = f"each size {reason}; not so: {', '.join(map(str, wrong))}"
        # The micro-batch first: the batch of an update is part of the experiment, how it is cut is not.
        keys = ("train.micro_batch_size", "train.global_batch_size")
        yield Violation("batch", "train.global_batch_size", reason, keys)


def _legal_values(config: RunConfig, world_size: int, rule: str, now: dict[str, Violation]) -> str | None:
    """The nearest values of the first key of ``rule``'s fixes that has any with which it holds, and no other is newly
    violated."""
    for key in now[rule].fixes:
        legal = []
        for value in candidates(config, world_size, key):
            left = _violations(with_changes(config, (key, value)), world_size)
            if rule not in left and left.keys() <= now.keys():
                legal.append(value)
        if legal:
            return f"{key}={alternatives(map(as_yaml, legal[:2]))}"
    return None

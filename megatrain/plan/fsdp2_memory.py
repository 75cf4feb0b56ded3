"""What FSDP2 holds on a rank, in bytes, as `megatrain.parallel.fsdp2` uses it.

Read from torch 2.13 (`torch.distributed.fsdp._fully_shard`) and measured: tests/unit/plan/test_rank_memory.py. A rank
has whole rows of each parameter in fp32, its master weights, or of a frozen one in the type that it computes in; rows
that are not there are padded, so that all data ranks hold as much. Weights are gathered in the type that they compute
in, and below ZeRO 3 stay so between the passes of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatrain.plan.engine_memory import STEP_BYTES, EngineMemory, saved_elements, weight_state_bytes
from megatrain.plan.stage_model import Parameter, StageModel, num_elements, share


def fsdp2_memory(part: StageModel) -> EngineMemory:
    """What is there under ``parallel.engine: fsdp2``."""
    stage, bytes_ = part.config.parallel.zero_stage, part.element_bytes
    state_bytes = weight_state_bytes(part.config) - 4  # the masters are the weights
    mine, frozen = _mine(part, part.trained), _mine(part, (p for p in part.parameters if not p.is_trained))
    gathered = _gathered(part, part.parameters)
    groups = [*message_groups(part)]
    largest = max(_gathered(part, group) for group in groups)
    reduced = max(_gathered(part, (p for p in group if p.is_trained)) for group in groups)
    passes = {
        "a layer's gradients": bytes_ * reduced,
        "gradients in a message": (4 * reduced + 4 * share(reduced, part.data)) if part.data > 1 else 4 * reduced,
        "weights in messages": 2 * bytes_ * largest if part.data > 1 else 0,  # of a layer and the one after it
    }
    if stage == 3:
        passes["gathered weights"] = bytes_ * _whole_at_once(part)
    return EngineMemory(
        weights=4 * mine + bytes_ * frozen + (bytes_ * gathered if stage < 3 else 0),
        gradients=4 * (num_elements(part.trained) if stage < 2 else mine),
        optimizer=state_bytes * _mine(part, part.updated) + STEP_BYTES * sum(p.copies for p in part.updated),
        owned=saved_elements(part, lambda p: _rows(part, p)),
        passes=passes,
        update={},
        cpu={},
    )


def message_groups(part: StageModel) -> Iterator[tuple[Parameter, ...]]:
    """The parameters that are gathered and reduced together, one of the alike layers: a layer, the embeddings, the last
    norms and the head; on a stage with the embedding and a tied head those two in one."""
    yield part.layer_parameters or part.encoder_layer_parameters
    ends = [
        part.embedding_parameters,
        (*part.encoder_parameters[len(part.encoder_layer_parameters) :], *part.head_parameters),
    ]
    if _is_tied(part):
        ends = [(*ends[0], *ends[1])]
    further = [part.encoder_layer_parameters] if part.layer_parameters else []
    yield from (group for group in (*ends, *further, *((p,) for p in part.bias_parameters)) if group)


def _whole_at_once(part: StageModel) -> int:
    """Elements of the weights that are whole at a time under ZeRO 3: a group's. The one with tied weights goes with the
    whole model, and stays from the beginning of the forward pass to the end of the backward pass."""
    layer, *others = (_gathered(part, group) for group in message_groups(part))
    return layer + others[0] if _is_tied(part) else max((layer, *others))


def _is_tied(part: StageModel) -> bool:
    """Whether embedding and head are one weight here."""
    return bool(part.embedding_parameters) and part.is_last and part.config.model.is_tied


def _rows(part: StageModel, parameter: Parameter) -> int:
    """Elements of this rank's rows, padding included; none where the vocabulary is not known yet."""
    return share(parameter.num_rows, part.data) * (parameter.numel // max(parameter.num_rows, 1))


def _mine(part: StageModel, parameters: Iterable[Parameter]) -> int:
    return sum(_rows(part, p) * p.copies for p in parameters)


def _gathered(part: StageModel, parameters: Iterable[Parameter]) -> int:
    """Elements of whole parameters, with the padding of all data ranks."""
    return _mine(part, parameters) * part.data

"""What models are trained for, one file each. A family names the objectives it can have, `objective.type` one of them.

No torch: an objective makes NumPy arrays, `megatrain.data.batches` batches of them.
"""

from __future__ import annotations

from typing import Any

from megatrain.config import ModelConfig, ObjectiveConfig
from megatrain.objectives.image_classification import ImageClassification
from megatrain.objectives.masked_lm import MaskedLM
from megatrain.objectives.next_token import NextToken
from megatrain.objectives.objective import DataSettings, Objective
from megatrain.objectives.sequence_classification import SequenceClassification
from megatrain.objectives.sequence_to_sequence import SequenceToSequence
from megatrain.objectives.span_corruption import SpanCorruption


def make_objective(config: ObjectiveConfig, model: ModelConfig, data: DataSettings, seed: int) -> Objective[Any]:
    """The objective of a run, or of a checkpoint that is evaluated. ``seed``: of what is random in training samples."""
    kind = config.of(model)
    if kind == "image_classification":
        return ImageClassification(config.image_classification, model, seed)
    if kind == "masked_lm":
        return MaskedLM(data, config.masked_lm, seed)
    if kind == "sequence_classification":
        return SequenceClassification(config, model, data)
    if kind == "span_corruption":
        return SpanCorruption(config, data, seed)
    if kind == "sequence_to_sequence":
        return SequenceToSequence(config, data)
    return NextToken(data)

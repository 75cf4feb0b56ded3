"""Why a figure differs from the papers' formula: one reason for each kind of row.

Those that name a setting were checked by changing it: the formula's figure came out. Of the others, the size of what
is named is the whole difference.
"""

from __future__ import annotations

from benchmarks._layout_formulas import StageModel

UNEXPLAINED = "unexplained"


def why(kind: str, part: StageModel) -> str:
    """The reason for a row that is off by more than the tolerance; UNEXPLAINED where none is known."""
    stage, is_fp32 = part.config.parallel.zero_stage, part.config.train.precision == "fp32"
    if part.config.parallel.engine == "fsdp2":
        if kind == "whole parameters":
            return (
                "the tied embedding is in a group with the whole model: whole from the forward pass on, beside a layer"
            )
        if kind == "sent: all-gather" and part.mesh.pipeline > 1:
            return "it foresees by the order of several forward passes, and gathers the last group once for nothing"
        if kind == "sent: all-gather":
            return "the tied embedding is gathered once a micro-batch, not twice"
        return UNEXPLAINED
    if kind == "optimizer" and stage >= 1 and is_fp32:
        return "DeepSpeed's ZeRO keeps fp32 master weights beside fp32 weights: 12 bytes a parameter in place of 8"
    if kind == "buffers" and stage == 3:
        return "reduce_bucket_size: stage 3 holds an fp32 bucket for a rank's whole model, 2 GiB at most"
    if kind == "whole parameters":
        return "stage3_max_live_parameters: models of up to 2^29 parameters stay whole until the backward pass"
    if kind == "sent: all-gather" and stage == 3:
        return "gathered once a micro-batch, not twice: whole until the backward pass (stage3_max_live_parameters)"
    if kind in ("sent: all-reduce", "sent: reduce-scatter") and stage == 1 and not is_fp32:
        return "DeepSpeed's BF16_Optimizer all-reduces gradients: twice the bytes of the paper's reduce-scatter"
    return UNEXPLAINED

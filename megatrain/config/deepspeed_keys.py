"""Which of DeepSpeed's own keys pass through a config, with which values, and why the others do not.

A key passes if the parity and checkpoint tests have run with it: each has a row in tests/parity/test_deepspeed_keys.py.
DeepSpeed ignores a top-level key that it does not know, and its own models of the values cannot be had without torch:
both are checked here. Names as of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megatrain.config.arithmetic import LARGEST_COUNT
from megatrain.config.problem import Problem

_OWN_KEYS = {
    "train.global_batch_size": "train_batch_size gradient_allreduce_op elasticity",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu",
    "train.global_batch_size, train.micro_batch_size": "gradient_accumulation_steps",
    "train.gradient_clipping": "gradient_clipping",
    "train.precision": "bf16 bfloat16 amp torch_autocast data_types communication_data_type "
    "seq_parallel_communication_data_type",
    "train.precision, train.initial_loss_scale_power, train.loss_scale_window": "fp16",
    "optimizer.type": "optimizer zero_allow_untested_optimizer",
    "schedule.type": "scheduler",
    "parallel.zero_stage": "zero_optimization.stage "
    # Weights that stay whole would be counted once a tensor rank in the gradient's norm.
    "zero_optimization.stage3_param_persistence_threshold zero_optimization.stage3_model_persistence_threshold",
    "parallel.offload": "zero_force_ds_cpu_optimizer zero_optimization.cpu_offload zero_optimization.cpu_offload_param "
    "zero_optimization.cpu_offload_use_pin_memory zero_optimization.offload_optimizer zero_optimization.offload_param",
    "parallel.recompute": "activation_checkpointing",
    "parallel.tensor": "tensor_parallel",
    "parallel.sequence": "sequence_parallel_size",
    "parallel.pipeline": "pipeline",
    "data.train": "data_efficiency",
    "checkpoint.every_steps": "checkpoint",
    "observe.tensorboard": "tensorboard csv_monitor",
    "observe.trackers": "wandb comet",
    "observe.log_every_steps": "steps_per_print timers wall_clock_breakdown memory_breakdown flops_profiler",
    "observe.straggler_report_seconds": "comms_logger",
}
DERIVED = {name: key for key, names in _OWN_KEYS.items() for name in names.split()}
"""DeepSpeed's keys that megatrain derives, and the key to use instead. A name includes all below it."""

# What is refused, and why. A name includes all below it.
REFUSED = {
    "aio": "it is read for offload to NVMe, which megatrain does not have",
    "disable_allgather": "DeepSpeed ignores it",
    "disable_python_gc": "Python would keep what training leaves behind",
    "dump_state": "it prints DeepSpeed's settings at each step",
    "gradient_predivide_factor": "gradients are summed in fp32 and divided once; ZeRO 2 and 3 would scale them wrongly",
    "prescale_gradients": "gradients are summed in fp32 and divided once; ZeRO 2 and 3 fail with it",
    "zero_optimization.enable_sanity_checks": "it is for finding errors in DeepSpeed",
    "zero_optimization.ignore_unused_parameters": "a model has no unused parameters here",
    "zero_optimization.leaf_module": "it is for mixtures of experts",
    "zero_optimization.log_trace_cache_warnings": "it is for finding errors in DeepSpeed",
    "zero_optimization.round_robin_gradients": "DeepSpeed reorders its state: weights would be saved under other names",
    "zero_optimization.stage3_module_granularity_threshold": "DeepSpeed fails where it takes a module as a whole",
    "zero_optimization.zero_hpz_partition_size": "its groups cross those of parallel.tensor",
    "zero_optimization.zero_quantized_gradients": "it rounds gradients: another training than that of one rank",
    "zero_optimization.zero_quantized_nontrainable_weights": "it rounds weights: another model than that of one rank",
    "zero_optimization.zero_quantized_weights": "it rounds weights: another model than that of one rank",
}

PASSED_THROUGH = {"zero_optimization"}

# By the least value and what it must be a multiple of; those of stage 3 may be 0.
ZERO_COUNTS = {
    "allgather_bucket_size": (2, 2),
    "reduce_bucket_size": (1, 1),
    "stage3_max_live_parameters": (0, 1),
    "stage3_max_reuse_distance": (0, 1),
    "stage3_prefetch_bucket_size": (0, 1),
    "sub_group_size": (1, 1),
}
ZERO_SWITCHES = {
    "allgather_partitions",
    "contiguous_gradients",
    "memory_efficient_linear",
    "overlap_comm",
    "parameter_alignment",
    "reduce_scatter",
    "stage3_allgather_sequential",
    "stage3_use_all_reduce_for_fetch_params",
    "use_multi_rank_bucket_allreduce",
}
ZERO_PASSED_THROUGH = {*ZERO_COUNTS, *ZERO_SWITCHES}


def deepspeed(given: Mapping[str, Any]) -> list[Problem]:
    """A problem for each key that does not pass, and for each value that DeepSpeed would not take."""
    problems = _section(given, "", PASSED_THROUGH)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return [*problems, Problem("deepspeed.zero_optimization", zero, "must be a mapping of keys to values")]
    problems += _section(zero, "zero_optimization.", ZERO_PASSED_THROUGH)
    values = ((name, value, _wrong_value(name, value)) for name, value in zero.items() if name in ZERO_PASSED_THROUGH)
    return problems + [
        Problem(f"deepspeed.zero_optimization.{name}", value, *wrong) for name, value, wrong in values if wrong
    ]


def _section(given: Mapping[str, Any], prefix: str, passed: set[str]) -> list[Problem]:
    problems = []
    for name, value in given.items():
        key = f"{prefix}{name}"
        if key in DERIVED:
            reason = "megatrain derives it from its own keys"
            problems.append(Problem(f"deepspeed.{key}", value, reason, DERIVED[key], is_value=False))
        elif key in REFUSED:
            problems.append(Problem(f"deepspeed.{key}", value, f"not passed on to DeepSpeed: {REFUSED[key]}"))
        elif name not in passed:
            close = difflib.get_close_matches(name, passed, n=1, cutoff=0.6)
            nearest = f"deepspeed.{prefix}{close[0]}" if close else None
            problems.append(
                Problem(f"deepspeed.{key}", value, "no such key is passed on to DeepSpeed", nearest, is_value=False)
            )
    return problems


def _wrong_value(name: str, value: Any) -> tuple[str, str | None] | None:
    """What is wrong with the value of a key in ``zero_optimization``, and the nearest right one; None: nothing."""
    if name in ZERO_SWITCHES:
        return None if isinstance(value, bool) else ("must be true or false", None)
    least, step = ZERO_COUNTS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value % 1:
        return "must be an integer", None
    if not least <= value <= LARGEST_COUNT:
        bound = f"at least {least}" if value < least else f"at most {LARGEST_COUNT}"
        return f"must be {bound}", str(least if value < least else LARGEST_COUNT)
    return (f"must be a multiple of {step}", str(int(value) + 1)) if value % step else None

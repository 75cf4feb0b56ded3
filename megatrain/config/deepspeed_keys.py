"""Which of DeepSpeed's own keys pass through a config, and which megatrain derives from its own.

DeepSpeed ignores a top-level key that it does not know, so a misspelt one is caught here. Names as of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from megatrain.config.problem import Problem

# What megatrain derives, and the key to use instead. A name stands for all below it too.
DERIVED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size, train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "gradient_allreduce_op": "train.global_batch_size",
    "steps_per_print": "observe.log_every_steps",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision, train.initial_loss_scale_power, train.loss_scale_window",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "seq_parallel_communication_data_type": "train.precision",
    "optimizer": "optimizer.type",
    "zero_allow_untested_optimizer": "optimizer.type",
    "zero_force_ds_cpu_optimizer": "parallel.offload",
    "scheduler": "schedule.type",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.cpu_offload": "parallel.offload",
    "zero_optimization.cpu_offload_param": "parallel.offload",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.offload",
    "zero_optimization.offload_optimizer": "parallel.offload",
    "zero_optimization.offload_param": "parallel.offload",
    # Weights that stay whole would be counted once a tensor rank in the gradient's norm.
    "zero_optimization.stage3_param_persistence_threshold": "parallel.zero_stage",
    "zero_optimization.stage3_model_persistence_threshold": "parallel.zero_stage",
    "activation_checkpointing": "parallel.recompute",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "pipeline": "parallel.pipeline",
    "elasticity": "train.global_batch_size",
    "data_efficiency": "data.train",
    "checkpoint": "checkpoint.every_steps",
    "tensorboard": "observe.tensorboard",
}

PASSED_THROUGH = {
    "aio",
    "comet",
    "comms_logger",
    "csv_monitor",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
}

ZERO_PASSED_THROUGH = {
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "overlap_comm",
    "parameter_alignment",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_allgather_sequential",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
}


def deepspeed(given: Mapping[str, Any]) -> list[Problem]:
    """A problem for each key that megatrain derives from its own keys, or that is not passed on."""
    problems = _section(given, "", PASSED_THROUGH)
    zero = given.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        return problems + _section(zero, "zero_optimization.", ZERO_PASSED_THROUGH)
    return [*problems, Problem("deepspeed.zero_optimization", zero, "must be a mapping of keys to values")]


def _section(given: Mapping[str, Any], prefix: str, passed: set[str]) -> list[Problem]:
    problems = []
    for name, value in given.items():
        key = f"{prefix}{name}"
        if key in DERIVED:
            reason = "megatrain derives it from its own keys"
            problems.append(Problem(f"deepspeed.{key}", value, reason, DERIVED[key], is_value=False))
        elif name not in passed:
            close = difflib.get_close_matches(name, passed, n=1, cutoff=0.6)
            nearest = f"deepspeed.{prefix}{close[0]}" if close else None
            problems.append(
                Problem(f"deepspeed.{key}", value, "no such key is passed on to DeepSpeed", nearest, is_value=False)
            )
    return problems

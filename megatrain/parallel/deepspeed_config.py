"""RunConfig to DeepSpeed's JSON, one way: nothing is read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatrain.config import RunConfig
from megatrain.plan.deepspeed_memory import bucket_elements


def deepspeed_config(config: RunConfig, data_size: int, num_parameters: int, num_updated: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run. ``data_size``: the ranks that it sums gradients over. ``num_parameters``: of this
    rank's part of the model, and ``num_updated``, those of them that are trained: they bound the buckets.

    Gradients are accumulated and summed in fp32 whatever the model computes in, and a step ends where its ``step`` is
    called, after any number of micro-batches. What the user put under ``deepspeed`` is laid over it, leaf by leaf (the
    config has refused the leaves that are derived here).
    """
    train, parallel = config.train, config.parallel
    is_half = train.precision != "fp32"
    bucket, gathered = bucket_elements(num_updated), bucket_elements(num_parameters)
    zero: dict[str, Any] = {
        "stage": max(parallel.zero_stage, 1) if is_half else parallel.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": False,  # else gradients that one rank needs are sent to all
    }
    if parallel.zero_stage == 3:
        # Parameters that stay whole would be counted once a tensor rank in the gradient's norm.
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": gathered,
            "sub_group_size": bucket,
        }
        zero |= {"stage3_max_live_parameters": gathered, "stage3_max_reuse_distance": gathered}
    zero |= offload_settings(config)
    settings: dict[str, Any] = {
        "train_batch_size": train.micro_batch_size * data_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Left out, it would be 1.0. Stage 0 in fp32 is clipped where its norm is taken, in DeepSpeedSharding.
        "gradient_clipping": train.gradient_clipping if is_half or parallel.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at each micro-batch
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if train.precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
    elif train.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 1.0}  # overridden before each step
    return _overlay(settings, config.deepspeed)


def offload_settings(config: RunConfig) -> dict[str, Any]:
    """What of ZeRO's state lives in CPU memory."""
    offload = config.parallel.offload
    settings: dict[str, Any] = {}
    if offload != "none":
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "all":
        settings["offload_param"] = {"device": "cpu", "pin_memory": True}
    return settings


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _overlay(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged

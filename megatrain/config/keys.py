"""The tree of keys behind the records: what stands where, and which key was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatrain.config.schema import RunConfig, Section

_NAMES_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "model.num_attention_heads"),
    **dict.fromkeys(("n_kv_head", "n_kv_heads", "num_kv_heads", "num_query_groups"), "model.num_key_value_heads"),
    **dict.fromkeys(("n_embd", "n_embed", "d_model", "dim", "hidden_dim", "embed_dim"), "model.hidden_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth"), "model.num_hidden_layers"),
    **dict.fromkeys(("ffn_hidden_size", "ffn_dim", "d_ff", "n_inner"), "model.intermediate_size"),
    **dict.fromkeys(("n_positions", "n_ctx", "max_sequence_length"), "model.max_position_embeddings"),
    **dict.fromkeys(("model_type", "architecture"), "model.family"),
    **dict.fromkeys(("rotary_base", "rope_base"), "model.rope_theta"),
    **dict.fromkeys(("dropout", "resid_pdrop", "resid_dropout"), "model.hidden_dropout"),
    **dict.fromkeys(("attn_pdrop", "attn_dropout"), "model.attention_dropout"),
    **dict.fromkeys(("norm_eps", "layernorm_epsilon"), "model.rms_norm_eps"),
    **dict.fromkeys(
        ("block_size", "seq_length", "sequence_length", "context_length", "max_seq_len", "max_seq_length"),
        "data.seq_len",
    ),
    **dict.fromkeys(("learning_rate", "max_lr", "base_lr", "peak_lr"), "optimizer.lr"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), "optimizer.betas"),
    **dict.fromkeys(("adam_epsilon", "adam_eps"), "optimizer.eps"),
    **dict.fromkeys(("optim", "optimizer_name"), "optimizer.type"),
    **dict.fromkeys(("batch_size", "train_batch_size", "total_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(
        ("local_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu", "device_batch_size"),
        "train.micro_batch_size",
    ),
    **dict.fromkeys(("max_steps", "max_iters", "train_iters", "num_steps", "num_iterations"), "train.steps"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_norm", "max_grad_norm"), "train.gradient_clipping"),
    **dict.fromkeys(("dtype", "mixed_precision", "torch_dtype"), "train.precision"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "train.eval_every_steps"),
    **dict.fromkeys(("eval_iters", "max_eval_batches"), "train.eval_batches"),
    **dict.fromkeys(("warmup", "warmup_iters", "lr_warmup_iters", "num_warmup_steps"), "schedule.warmup_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_decay_style", "lr_schedule"), "schedule.type"),
    **dict.fromkeys(("min_lr", "min_lr_factor"), "schedule.min_lr_ratio"),
    **dict.fromkeys(("save_interval", "save_steps", "save_every"), "checkpoint.every_steps"),
    **dict.fromkeys(("save_total_limit", "keep_latest_k"), "checkpoint.keep"),
    **dict.fromkeys(("logging_steps", "log_interval"), "observe.log_every_steps"),
    **dict.fromkeys(("output_dir", "out_dir", "save_folder", "run_dir"), "run.dir"),
    **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallel_degree", "tp_size", "tp"), "parallel.tensor"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pipeline_parallel_degree", "pp_size", "pp"), "parallel.pipeline"),
    **dict.fromkeys(("sequence_parallel", "sequence_parallelism"), "parallel.sequence"),
    **dict.fromkeys(
        ("activation_checkpointing", "gradient_checkpointing", "recompute_granularity"), "parallel.recompute"
    ),
}
"""What other projects (nanoGPT, Megatron-LM, torchtitan, Hugging Face's Trainer, ...) call keys of ours."""


def record_of(annotation: Any) -> type[Section] | None:
    """The record inside an annotation, such as TrainingDataset in tuple[TrainingDataset, ...], if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (record_of(argument) for argument in get_args(annotation))
    return next((record for record in inner if record is not None), None)


def record_at(path: Sequence[str | int]) -> type[Section] | None:
    """The record whose keys stand below `path`, if any; list indices in it count as steps into the list's record."""
    record: type[Section] | None = RunConfig
    for name in path:
        if isinstance(name, int) or record is None:
            continue
        field = record.model_fields.get(name)
        record = record_of(field.annotation) if field else None
    return record


def is_section(field: FieldInfo) -> bool:
    """Whether the field always holds a record, so that its keys are set one by one."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def is_list(field: FieldInfo) -> bool:
    """Whether the field holds a list."""
    return get_origin(field.annotation) is tuple


def leaves(record: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full path, in the order of the schema; keys of a list's entries stand under `*`."""
    for name, field in record.model_fields.items():
        inner = record_of(field.annotation)
        if not is_section(field):
            yield f"{prefix}{name}", field
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.*." if is_list(field) else f"{prefix}{name}.")


def nearest_key(unknown: str, record: type[Section] | None) -> str | None:
    """The key that was probably meant by the full path `unknown`, which stands in `record`."""
    section, _, name = unknown.rpartition(".")
    elsewhere = _NAMES_ELSEWHERE.get(name.lower().replace("-", "_"))
    if elsewhere is not None:
        return elsewhere
    beside = difflib.get_close_matches(name, record.model_fields if record else (), n=1, cutoff=0.7)
    if beside:
        return f"{section}.{beside[0]}" if section else beside[0]
    everywhere = [path for path, _ in leaves()]
    same_name = [path for path in everywhere if path.rpartition(".")[2] == name]
    if same_name:
        return same_name[0]
    return next(iter(difflib.get_close_matches(unknown, everywhere, n=1, cutoff=0.7)), None)


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Path, former and present value of every key that differs between two dumps; of `data.train`, whose entries
    stand under `*`, as far as both go."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted(before.keys() | after.keys()):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif path == "data.train":
        for one, other in zip(before, after, strict=False):
            yield from differences(one, other, f"{path}.*")
    elif before != after:
        yield path, before, after

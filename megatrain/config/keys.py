"""The tree of keys of the schema, and which key was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatrain.config.schema import RunConfig, Section

_NAMES_ELSEWHERE = {
    "model.num_attention_heads": "n_head n_heads num_heads",
    "model.num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads num_query_groups",
    "model.hidden_size": "n_embd n_embed d_model dim hidden_dim embed_dim",
    "model.num_hidden_layers": "n_layer n_layers num_layers depth",
    "model.intermediate_size": "ffn_hidden_size ffn_dim d_ff n_inner",
    "model.max_position_embeddings": "n_positions n_ctx max_sequence_length",
    "model.family": "model_type architecture",
    "model.rope_theta": "rotary_base rope_base",
    "model.hidden_dropout": "dropout resid_pdrop resid_dropout",
    "model.attention_dropout": "attn_pdrop attn_dropout",
    "model.rms_norm_eps": "norm_eps layernorm_epsilon",
    "data.seq_len": "block_size seq_length sequence_length context_length max_seq_len max_seq_length",
    "optimizer.lr": "learning_rate max_lr base_lr peak_lr",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.type": "optim optimizer_name",
    "train.global_batch_size": "batch_size train_batch_size total_batch_size rampup_batch_size",
    "train.micro_batch_size": "local_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu "
    "device_batch_size",
    "train.steps": "max_steps max_iters train_iters num_steps num_iterations",
    "train.gradient_clipping": "grad_clip clip_grad max_norm max_grad_norm",
    "train.precision": "dtype mixed_precision torch_dtype",
    "train.eval_every_steps": "eval_interval eval_steps",
    "train.eval_batches": "eval_iters max_eval_batches",
    "train.check_replica_hash_interval": "check_weight_hash_across_dp_replicas_interval",
    "schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters num_warmup_steps",
    "schedule.type": "lr_scheduler_type lr_decay_style lr_schedule",
    "schedule.min_lr_ratio": "min_lr min_lr_factor",
    "checkpoint.every_steps": "save_interval save_steps save_every",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "observe.log_every_steps": "logging_steps log_interval",
    "run.dir": "output_dir out_dir save_folder run_dir",
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_degree tp_size tp",
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_degree pp_size pp",
    "parallel.pipeline_chunks": "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank",
    "parallel.engine": "use_torch_fsdp2 fsdp strategy",
    "parallel.sequence": "sequence_parallel sequence_parallelism",
    "parallel.recompute": "activation_checkpointing gradient_checkpointing recompute_granularity",
}
"""Our keys, and what other projects (nanoGPT, Megatron-LM, torchtitan, Hugging Face's Trainer, ...) call them."""
_KEY_OF = {name: key for key, names in _NAMES_ELSEWHERE.items() for name in names.split()}


def record_of(annotation: Any) -> type[Section] | None:
    """The record inside an annotation, such as TrainingDataset in tuple[TrainingDataset, ...], if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (record_of(argument) for argument in get_args(annotation))
    return next((record for record in inner if record is not None), None)


def record_at(path: Sequence[str | int], root: type[Section] = RunConfig) -> type[Section] | None:
    """The record whose keys are below `path`, if any; list indices in it count as steps into the list's record."""
    record: type[Section] | None = root
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
    return get_origin(field.annotation) is tuple


def leaves(record: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key with its full path, in the order of the schema; keys of a list's entries are under `*`."""
    for name, field in record.model_fields.items():
        inner = record_of(field.annotation)
        if not is_section(field):
            yield f"{prefix}{name}", field
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.*." if is_list(field) else f"{prefix}{name}.")


def nearest_key(unknown: str, record: type[Section] | None, root: type[Section] = RunConfig) -> str | None:
    """The key that was probably meant by the full path `unknown`, a key of `record` somewhere below `root`."""
    section, _, name = unknown.rpartition(".")
    elsewhere = _KEY_OF.get(name.lower().replace("-", "_"))
    if elsewhere is not None and root is RunConfig:
        return elsewhere
    beside = difflib.get_close_matches(name, record.model_fields if record else (), n=1, cutoff=0.7)
    if beside:
        return f"{section}.{beside[0]}" if section else beside[0]
    everywhere = [path for path, _ in leaves(root)]
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


def flat(node: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config's dump by its whole key; a list's entries by their numbers."""
    if isinstance(node, Mapping) and node:
        for key, below in node.items():
            yield from flat(below, f"{path}.{key}" if path else key)
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        for number, below in enumerate(node):
            yield from flat(below, f"{path}.{number}")
    else:
        yield path, node

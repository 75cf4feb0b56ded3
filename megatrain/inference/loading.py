"""A checkpoint's model, to be used and not to be trained: whole on one device, or cut among tensor ranks."""

from __future__ import annotations

import torch

from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import SavedConfig
from megatrain.config import LoraConfig, ModelConfig, RunConfig
from megatrain.distributed.bootstrap import RankInfo, export_rank
from megatrain.distributed.device import has_gpu, local_device
from megatrain.distributed.fragment import ShardSpec
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.rendezvous import init_process_group
from megatrain.distributed.topology import Topology
from megatrain.errors import ConfigError
from megatrain.model.encoder_decoder import WholeModel, whole_model
from megatrain.model.linear import add_adapters
from megatrain.plan import rules

_WAIT_SECONDS = 600.0
"""For the other ranks to come."""
_LONGEST_SECONDS = 86400.0
"""For them to end: no rank waits before it has done its share, and whoever started them ends all where one fails."""


def load_decoder(reader: CheckpointReader, dtype: torch.dtype | None = None) -> WholeModel:
    """The whole model of a checkpoint on this process's device, in evaluation mode.

    ``dtype``: None takes bf16 on a GPU and fp32 on a CPU. Raises CheckpointError where it is damaged.
    """
    model = empty_decoder(reader.saved.model, dtype, reader.saved.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read_parameter(ShardSpec.whole(name, parameter.shape), "weight"))
    return model


def empty_decoder(config: ModelConfig, dtype: torch.dtype | None = None, lora: LoraConfig | None = None) -> WholeModel:
    """A whole model on this process's device, in evaluation mode; its weights are still to be filled in."""
    device = torch.device("cuda" if has_gpu() else "cpu")
    with torch.device("meta"):
        model = whole_model(config)
        add_adapters(model, lora)
    model.to(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)).to_empty(device=device)
    model.tie_weights()
    return model.eval()


def load_on_rank(reader: CheckpointReader, rank: RankInfo | None, tensor: int) -> tuple[WholeModel, Groups | None]:
    """This rank's part of the model, in evaluation mode, and its groups: None where there are no other ranks.

    ``tensor`` ranks share each of the model's matrices. Collective over the ranks that ``rank`` is one of. Raises
    ConfigError where the model or the ranks cannot be cut so, CheckpointError where the checkpoint is damaged.
    """
    if rank is None or rank.world_size == 1 == tensor:
        return load_decoder(reader), None
    config = _as_run(reader.saved, rank.world_size, tensor)
    export_rank(rank)
    device = local_device(rank.local_rank)
    init_process_group(rank, _WAIT_SECONDS, _LONGEST_SECONDS)
    topology = Topology.of(rank.world_size, tensor, 1)
    groups = make_groups(topology, rank.rank, device, _LONGEST_SECONDS, config.model.kv_heads)
    model = load_decoder(reader) if tensor == 1 else _load_part(reader, config, groups)
    return model, groups


def _as_run(saved: SavedConfig, world_size: int, tensor: int) -> RunConfig:
    """The layout as a run's, which is held to the same rules. Raises ConfigError where it breaks one."""
    if world_size % tensor:
        raise ConfigError(f"--tensor {tensor} must divide the {world_size} ranks.")
    config = RunConfig.model_validate(
        {
            "run": {"dir": ".", "init_from": "." if saved.lora else None},
            "model": saved.model,
            "data": {"train": [{"path": "."}], "seq_len": saved.data.seq_len},
            "train": {
                "steps": 1,
                "global_batch_size": max(world_size // tensor, 1),
                "micro_batch_size": 1,
                "precision": "bf16" if has_gpu() else "fp32",
                "compile": "off",  # lengths vary
            },
            "parallel": {"tensor": tensor, "zero_stage": 0},
            "optimizer": {"lr": 0.0},
            "lora": saved.lora,
        }
    )
    try:
        rules.check(config, world_size)
    except ConfigError as error:
        raise ConfigError(f"--tensor {tensor}: {error}") from None
    return config


def _load_part(reader: CheckpointReader, config: RunConfig, groups: Groups) -> WholeModel:
    """This rank's part of the model, filled: no rank ever has the whole."""
    from megatrain.parallel.shard import DTYPES, allocate, shard_model

    with torch.device("meta"):
        model = whole_model(config.model)
        add_adapters(model, config.lora)
    sharded = shard_model([model], config, groups, recomputed=())
    allocate([model], DTYPES[config.train.precision], groups.device)
    with torch.no_grad():
        for name, parameter in sharded.parameters().items():
            parameter.copy_(reader.read_parameter(sharded.specs[name], "weight"))
    return model.eval()

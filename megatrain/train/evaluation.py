"""The loss of a checkpoint on a dataset: on one device, or shared out to many ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.progress import track
from torch import nn

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import SavedConfig, saved_config
from megatrain.checkpoint.store import resolve
from megatrain.config import RunConfig
from megatrain.data import Dataset, open_dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches, Windows
from megatrain.data.dataset import borders
from megatrain.distributed.bootstrap import RankInfo, export_rank
from megatrain.distributed.device import has_gpu, local_device
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.rendezvous import meet
from megatrain.distributed.topology import Topology
from megatrain.errors import ConfigError, DataError
from megatrain.model.decoder import Decoder
from megatrain.plan import rules
from megatrain.train.inference import TOKENIZER, load_decoder

_TOKENS_AT_ONCE = 8192
_WAIT_SECONDS = 600.0
"""For the other ranks to come."""
_LONGEST_SECONDS = 86400.0
"""For them to end: no rank waits before it has done its share, and whoever started them ends all where one fails."""


class Share(NamedTuple):
    """What a rank has of the work: its part of the model, which takes a batch to a loss; its place among the ranks that
    share the windows; ``groups``: None where there are no other ranks."""

    model: nn.Module
    data_rank: int
    num_data_ranks: int
    groups: Groups | None


def evaluate_checkpoint(
    path: Location,
    data: str | Path,
    seq_len: int | None = None,
    *,
    show_progress: bool,
    rank: RankInfo | None = None,
    tensor: int = 1,
) -> dict[str, Any]:
    """Loss (nats a token), perplexity, bits per byte, tokens and UTF-8 bytes scored: each window of the dataset once.

    ``seq_len``: tokens a window, the model's context at most; None: as many as the model was trained on. The same
    targets count as in training. Collective over the ranks that ``rank`` is one of, all with the same figures;
    ``tensor``: so many of them share each of the model's matrices.
    """
    dataset = open_dataset(data)
    reader = CheckpointReader(resolve(path))
    saved = saved_config(reader.manifest, reader.folder)
    _check_tokenizer(dataset, reader)
    seq_len = seq_len or saved.data.seq_len
    if seq_len > saved.model.max_position_embeddings:
        raise ConfigError(
            f"--seq-len {seq_len} is more than the model's context: {saved.model.max_position_embeddings} tokens "
            "(model.max_position_embeddings)."
        )
    share = _share_of(reader, saved, rank, tensor)
    windows = Windows(dataset, seq_len, saved.data.document_mask, saved.data.scores_after_eod)
    maker = BatchMaker([windows], max(1, _TOKENS_AT_ONCE // seq_len))
    batches = EvaluationBatches(maker, share.data_rank, share.num_data_ranks)
    device = next(share.model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode():
        for batch in track(batches, "evaluating", total=len(batches), disable=not show_progress, transient=True):
            total += share.model(batch.to(device))
    return {**_figures(_sum(float(total), share.groups), batches.num_targets, windows.num_bytes()), "seq_len": seq_len}


def _figures(total: float, num_targets: int, num_bytes: int) -> dict[str, Any]:
    loss = total / num_targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else math.nan,
        "tokens": num_targets,
        "bytes": num_bytes,
    }


def _share_of(reader: CheckpointReader, saved: SavedConfig, rank: RankInfo | None, tensor: int) -> Share:
    if rank is None or rank.world_size == 1 == tensor:
        return Share(load_decoder(reader.folder).model, 0, 1, None)
    config = _as_run(saved, rank.world_size, tensor)
    export_rank(rank)
    device = local_device(rank.local_rank)
    meet(rank, _WAIT_SECONDS, _LONGEST_SECONDS)
    topology = Topology.of(rank.world_size, tensor, 1)
    groups = make_groups(topology, rank.rank, device, _LONGEST_SECONDS)
    model = load_decoder(reader.folder).model if tensor == 1 else _load_part(reader, config, groups)
    return Share(model, groups.coordinate.data, topology.data, groups)


def _as_run(saved: SavedConfig, world_size: int, tensor: int) -> RunConfig:
    """The layout as a run's, which is held to the same rules. Raises ConfigError where it breaks one."""
    if world_size % tensor:
        raise ConfigError(f"--tensor {tensor} must divide the {world_size} ranks.")
    config = RunConfig.model_validate(
        {
            "run": {"dir": "."},
            "model": saved.model,
            "data": {"train": [{"path": "."}], "seq_len": saved.data.seq_len},
            "train": {
                "steps": 1,
                "global_batch_size": max(world_size // tensor, 1),
                "micro_batch_size": 1,
                "precision": "bf16" if has_gpu() else "fp32",
            },
            "parallel": {"tensor": tensor, "zero_stage": 0},
            "optimizer": {"lr": 0.0},
        }
    )
    try:
        rules.check(config, world_size)
    except ConfigError as error:
        raise ConfigError(f"--tensor {tensor}: {error}") from None
    return config


def _load_part(reader: CheckpointReader, config: RunConfig, groups: Groups) -> nn.Module:
    """This rank's part of the model, filled: no rank ever has the whole."""
    from megatrain.parallel.shard import shard_model  # DeepSpeed, which takes seconds to import
    from megatrain.train.assemble import cut_of

    with torch.device("meta"):
        model = Decoder(config.model)
    sharded = shard_model(model, config, groups, cut_of(config))
    with torch.no_grad():
        for local in sharded.parameters.values():
            local.parameter.copy_(reader.read_parameter(local.placement, "weight"))
    return sharded.module.eval()


def _sum(total: float, groups: Groups | None) -> float:
    """Of all ranks; those along the tensor axis have computed the same."""
    if groups is None:
        return total
    (every,) = groups.sum([total if groups.coordinate.tensor == 0 else 0.0])
    dist.destroy_process_group()
    return every


def _check_tokenizer(dataset: Dataset, reader: CheckpointReader) -> None:
    if not any(entry.file == TOKENIZER for entry in reader.manifest.files):
        return
    if reader.read_file(TOKENIZER) != dataset.tokenizer_path.read_bytes():
        raise DataError(
            f"{dataset.path} was tokenized with another tokenizer than the one {reader.folder} was trained with: its "
            f"loss would mean nothing. Tokenize the text again with --tokenizer {reader.folder / TOKENIZER}."
        )
    special = reader.manifest.special_tokens
    if special is None or special.eod is None or reader.manifest.layout.get("imported"):
        return
    bos = special.bos if special.begins_with_bos else None
    if (special.eod.id, None if bos is None else bos.id) != (dataset.eod_id, dataset.bos_id):
        begun = "" if bos is None else f" and began with {bos.token} (id {bos.id})"
        raise DataError(
            f"{dataset.path} {borders(dataset.manifest)}, and what {reader.folder} was trained on ended with "
            f"{special.eod.token} (id {special.eod.id}){begun}: its loss there would mean nothing. Tokenize the text "
            "again with the same --eod-token and --bos-token."
        )

"""The loss of a checkpoint on a dataset: on one device, or shared out to many ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from megatrain.batch import Batch
from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import TARGET_TOKENIZER, TOKENIZER
from megatrain.checkpoint.origin import gives_same_ids
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import resolve
from megatrain.config import ObjectiveConfig, checks
from megatrain.data import Dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches
from megatrain.data.dataset import document_markers
from megatrain.data.images import AnyDataset, ImageDataset, open_for
from megatrain.distributed.bootstrap import RankInfo
from megatrain.distributed.groups import Groups
from megatrain.errors import ConfigError, DataError
from megatrain.inference.assets import Assets
from megatrain.inference.loading import load_on_rank
from megatrain.model.decoder import DecoderStage
from megatrain.objectives import make_objective
from megatrain.tasks.bootstrap import Floats, bootstrap, ratio

_TOKENS_AT_ONCE = 8192


def evaluate_checkpoint(
    path: Location,
    data: str | Path,
    seq_len: int | None = None,
    *,
    show_progress: bool,
    rank: RankInfo | None = None,
    tensor: int = 1,
    ema: bool = False,
) -> dict[str, Any]:
    """Loss (nats a token), perplexity, bits per byte, tokens and UTF-8 bytes scored: each window of the dataset once.

    Of a model that is asked some tokens alone, in place of bits per byte and bytes, the share of them that it finds,
    with its 95% interval by bootstrap over the windows. Of a classifier of images: loss, the share of images whose
    likeliest label is theirs, with its interval, and images. ``seq_len``: tokens a window, the model's context at most;
    None: as many as the model was trained on; ``left_out``: pairs or conversations that fit into none, if there are
    any. The same targets count as in training. Collective over the ranks that
    ``rank`` is one of, all with the same figures; ``tensor``: so many of them share each of the model's matrices.
    ``ema``: with the averaged weights.
    """
    reader = CheckpointReader(resolve(path), ema=ema)
    saved = reader.saved
    dataset = open_for(data, images=saved.model.description.reads_images)
    if isinstance(dataset, Dataset):
        _check_tokenizer(dataset, reader)
    if saved.model.description.classifies:
        _check_labels(dataset, reader)
    seq_len = seq_len or saved.data.seq_len
    if saved.model.num_places not in (None, seq_len):
        raise ConfigError(
            f"--seq-len {seq_len}: to this model an image is {saved.model.num_places} tokens: leave it out."
        )
    if seq_len > saved.model.longest_sequence:
        raise ConfigError(
            f"--seq-len {seq_len} is more than the model's context: {saved.model.max_position_embeddings} tokens "
            "(model.max_position_embeddings)."
        )
    objective = _objective(reader, dataset)
    if (problem := checks.too_short(objective.of(saved.model), seq_len)) is not None:
        raise ConfigError(f"--seq-len {seq_len}: {problem}. Give {checks.SHORTEST_ALONE} or more.")
    model, groups = load_on_rank(reader, rank, tensor)
    settings = saved.data.model_copy(update={"seq_len": seq_len})
    classifies = saved.model.description.classifies
    source = make_objective(objective, saved.model, settings, seed=0).evaluation_source(dataset)
    maker = BatchMaker([source], max(1, _TOKENS_AT_ONCE // seq_len))
    share = (0, 1) if groups is None else groups.batch_share
    batches = EvaluationBatches(maker, *share)
    shown = track(batches, "evaluating", total=len(batches), disable=not show_progress, transient=True)
    with torch.inference_mode():
        answers = torch.cat([_answers(model, batch.to(model.device), classifies) for batch in shown])
    sums = _of_all_ranks(answers.cpu().numpy(), groups)
    left_out = 0 if source.plan is None else source.plan.dropped.conversations
    loss = float(sums[:, 0].sum()) / batches.num_targets
    if classifies:
        kind = "images" if isinstance(dataset, ImageDataset) else "texts"
        return {"loss": loss, **_accuracy(sums), kind: batches.num_targets}
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    figures |= _accuracy(sums) if model.pick else _bits_per_byte(loss * batches.num_targets, source.num_bytes())
    figures |= {"tokens": batches.num_targets, "seq_len": seq_len}
    return {**figures, "left_out": left_out} if left_out else figures


def _answers(model: DecoderStage, batch: Batch, classifies: bool) -> Tensor:
    """Sums over the scored targets, fp64: [1, 1], the batch's loss; or where a model is asked some tokens alone, of
    each sample [B, 3]: loss, targets that are found, targets. Of a model that ``classifies``, of each target
    [B * M, 3]: those of a sample have nothing in common."""
    if model.pick is None:
        loss: Tensor = model(batch)
        return loss.double().view(1, 1)
    scores_BM, is_found_BM = model.target_scores(batch).view(2, *batch.targets_BM.shape).double()
    mask_BM = torch.ones_like(scores_BM) if batch.loss_mask_BM is None else batch.loss_mask_BM.double()
    figures = torch.stack([x_BM * mask_BM for x_BM in (-scores_BM, is_found_BM, torch.ones_like(mask_BM))], -1)
    return figures.flatten(0, 1) if classifies else figures.sum(1)


def _of_all_ranks(sums: Floats, groups: Groups | None) -> Floats:
    """Those along the tensor axis have computed the same."""
    if groups is None:
        return sums
    every = groups.all_gather_object(sums if groups.coordinate.tensor == 0 else sums[:0])
    dist.destroy_process_group()
    return np.concatenate(every)


def _accuracy(sums: Floats) -> dict[str, float]:
    figure = ratio(*sums[sums[:, 2] > 0][:, 1:].T)
    (sampled,) = bootstrap([figure])
    errors = {} if sampled is None else {f"accuracy_{name}": value for name, value in sampled._asdict().items()}
    return {"accuracy": figure.value, **errors}


def _bits_per_byte(total: float, num_bytes: int) -> dict[str, float]:
    return {"bits_per_byte": total / math.log(2) / num_bytes if num_bytes else math.nan, "bytes": num_bytes}


def _objective(reader: CheckpointReader, dataset: AnyDataset) -> ObjectiveConfig:
    """That of the training; but pairs are scored as pairs, by a model that was trained on text alone too."""
    trained = reader.saved.objective
    if reader.saved.model.description.encoder and isinstance(dataset, Dataset) and dataset.holds_pairs:
        return trained.model_copy(update={"type": "sequence_to_sequence"})
    return trained


def _check_labels(dataset: AnyDataset, reader: CheckpointReader) -> None:
    known = Assets.of_checkpoint(reader).label_names
    if known is not None and known != dataset.label_names:
        raise DataError(
            f"{dataset.path} has other labels than {reader.folder} was trained with, or in another order: its figures "
            "would mean nothing. Make it with --label-names, in the order of the training data."
        )


def _check_tokenizer(dataset: Dataset, reader: CheckpointReader) -> None:
    if reader.manifest.file(TOKENIZER) is None:
        return
    if not gives_same_ids(reader.read_file(TOKENIZER), dataset.tokenizer_path.read_bytes()):
        raise DataError(
            f"{dataset.path} was tokenized with another tokenizer than the one {reader.folder} was trained with: its "
            f"loss would mean nothing. Tokenize the text again with --tokenizer {reader.folder / TOKENIZER}."
        )
    path = dataset.target_tokenizer_path
    known = None if reader.manifest.file(TARGET_TOKENIZER) is None else reader.read_file(TARGET_TOKENIZER)
    if known != (None if path is None else path.read_bytes()):
        how = "without" if known is None else "with"
        raise DataError(
            f"The targets of {dataset.path} have another tokenizer than {reader.folder} was trained with: their loss "
            f"would mean nothing. Tokenize the pairs again {how} --target-tokenizer"
            f"{'' if known is None else f' {reader.folder / TARGET_TOKENIZER}'}."
        )
    special = reader.manifest.special_tokens
    if special is None or special.eod is None or reader.manifest.layout.get("imported"):
        return
    bos = special.bos if special.begins_with_bos else None
    if (special.eod.id, None if bos is None else bos.id) != (dataset.eod_id, dataset.bos_id):
        begun = "" if bos is None else f" and began with {bos.token} (id {bos.id})"
        raise DataError(
            f"{dataset.path} {document_markers(dataset.manifest)}, and what {reader.folder} was trained on ended with "
            f"{special.eod.token} (id {special.eod.id}){begun}: its loss there would mean nothing. Tokenize the text "
            "again with the same --eod-token and --bos-token."
        )

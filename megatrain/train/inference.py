"""What a checkpoint is used for on one device: to generate text, to be evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.saved_config import SavedConfig, saved_config
from megatrain.checkpoint.store import resolve
from megatrain.data import Dataset, open_dataset
from megatrain.data.batches import BatchMaker, EvaluationBatches, Windows
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText
from megatrain.distributed.device import has_gpu
from megatrain.distributed.fragment import Placement
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.model.decoder import Decoder
from megatrain.model.generate import Sampling, generate
from megatrain.train.companions import Companions

TOKENIZER = "tokenizer.json"
_TOKENS_AT_ONCE = 8192
_DECODED_AT_ONCE, _KEPT = 256, 16


class Loaded(NamedTuple):
    """A checkpoint in use."""

    model: Decoder
    saved: SavedConfig
    reader: CheckpointReader


def load_decoder(path: Location, dtype: torch.dtype | None = None) -> Loaded:
    """The whole model of a checkpoint on this process's device, in evaluation mode.

    ``dtype``: None takes bf16 on a GPU and fp32 on a CPU. Raises CheckpointError where it is damaged.
    """
    reader = CheckpointReader(resolve(path))
    saved = saved_config(reader.manifest, reader.folder)
    device = torch.device("cuda" if has_gpu() else "cpu")
    with torch.device("meta"):
        model = Decoder(saved.model)
    model.to(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read_parameter(Placement.whole(name, parameter.shape), "weight"))
    return Loaded(model.eval(), saved, reader)


def generate_text(
    path: Location,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    warn: Callable[[str], None],
) -> Iterator[str]:
    """Yield the prompt, then what the model goes on with, piece by piece as it can be shown.

    Raises ConfigError for a prompt with bytes that are no text. ``warn`` hears of characters that have no tokens.
    """
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes that are none
        raise ConfigError("--prompt has bytes that are not UTF-8: give it as text.")
    sampling = Sampling(temperature, top_k, top_p if top_p != 1.0 else None)
    model, _, reader = load_decoder(path)
    tokenizer = Tokenizer(reader.read_file(TOKENIZER), reader.folder / TOKENIZER, CheckpointError)
    ids = tokenizer.encode(prompt)
    unknown = UnknownText(tokenizer).count([prompt], np.array(ids), np.array([0, len(ids)]), ["the prompt"])
    if unknown.characters:
        warn(f"The checkpoint's tokenizer has no tokens for {unknown}.")
    room = model.config.max_position_embeddings - len(ids)
    tokens = generate(
        model,
        ids,
        min(max_new_tokens, room) if room > 0 else max_new_tokens,
        sampling,
        seed,
        Companions.of_checkpoint(reader.folder, reader.manifest).stop_ids,
        tokenizer.vocab_size,
    )
    yield prompt
    yield from _decode_stream(tokenizer, ids, tokens)


def evaluate_checkpoint(
    path: Location, data: str | Path, seq_len: int | None = None, *, show_progress: bool
) -> dict[str, Any]:
    """Loss (nats a token), perplexity, bits per byte, tokens and UTF-8 bytes scored: each window of the dataset once.

    ``seq_len``: tokens a window, the model's context at most; None: as many as the model was trained on. The same
    targets count as in training.
    """
    dataset = open_dataset(data)
    model, saved, reader = load_decoder(path)
    _check_tokenizer(dataset, reader)
    seq_len = seq_len or saved.data.seq_len
    if seq_len > saved.model.max_position_embeddings:
        raise ConfigError(
            f"--seq-len {seq_len} is more than the model's context: {saved.model.max_position_embeddings} tokens "
            "(model.max_position_embeddings)."
        )
    windows = Windows(dataset, seq_len, saved.data.document_mask, saved.data.scores_after_eod)
    batches = EvaluationBatches(BatchMaker([windows], max(1, _TOKENS_AT_ONCE // seq_len)), 0, 1)
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for batch in track(batches, "evaluating", total=len(batches), disable=not show_progress, transient=True):
            total += float(model(batch.to(device)))
    num_bytes = windows.num_bytes()
    loss = total / batches.num_targets
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes else math.nan,
        "tokens": batches.num_targets,
        "bytes": num_bytes,
        "seq_len": seq_len,
    }


def _check_tokenizer(dataset: Dataset, reader: CheckpointReader) -> None:
    if not any(entry.file == TOKENIZER for entry in reader.manifest.files):
        return
    if reader.read_file(TOKENIZER) != dataset.tokenizer_path.read_bytes():
        raise DataError(
            f"{dataset.path} was tokenized with another tokenizer than the one {reader.folder} was trained with: its "
            f"loss would mean nothing. Tokenize the text again with --tokenizer {reader.folder / TOKENIZER}."
        )
    special, is_trained = reader.manifest.special_tokens, not reader.manifest.layout.get("imported")
    if is_trained and special is not None and special.eod is not None and special.eod.id != dataset.eod_id:
        raise DataError(
            f"{dataset.path} ends its documents with {dataset.manifest.eod_token} (id {dataset.eod_id}), and what "
            f"{reader.folder} was trained on ended with {special.eod.token} (id {special.eod.id}): its loss there "
            "would mean nothing. Tokenize the text again with --eod-token."
        )


def _decode_stream(tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """What follows the prompt, as soon as it is whole: a character's bytes may be spread over several tokens.

    Decoded with what is before it and cut, as a decoder may drop the space in front of a text.
    """
    ids, shown = prompt, tokenizer.decode(prompt)
    text = shown
    for token in tokens:
        ids = [*ids, token]
        text = tokenizer.decode(ids)
        # Of a run of byte tokens a decoder makes nothing of what came before, if it is no text in the end.
        if text.endswith("\ufffd") or tokenizer.is_byte(token):
            continue
        yield text[len(shown) :]
        if len(ids) > _DECODED_AT_ONCE and "\ufffd" not in (end := tokenizer.decode(ids[-_KEPT:])):
            ids, text = ids[-_KEPT:], end
        shown = text
    yield text[len(shown) :]

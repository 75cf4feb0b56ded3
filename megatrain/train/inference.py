"""The text that a checkpoint's model generates, on one device or on tensor ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch.distributed as dist

from megatrain.checkpoint.location import Location
from megatrain.checkpoint.manifest import TOKENIZER
from megatrain.checkpoint.reader import CheckpointReader
from megatrain.checkpoint.stores import resolve
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.unknown_text import UnknownText
from megatrain.distributed.bootstrap import RankInfo
from megatrain.errors import CheckpointError, ConfigError
from megatrain.model.decoder import Decoder
from megatrain.model.generate import Sampling, generate
from megatrain.train.assets import Assets
from megatrain.train.loading import load_on_rank

_DECODED_AT_ONCE, _KEPT = 256, 16


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
    rank: RankInfo | None = None,
) -> Iterator[str]:
    """Yield the prompt, then what the model goes on with, piece by piece as it can be shown.

    Raises ConfigError for a prompt with bytes that are no text. ``warn`` hears of characters that have no tokens, and
    in the end of a context that was full before the text had come to its end. Collective over the ranks that ``rank``
    is one of, which share each of the model's matrices and all yield the same.
    """
    sampling = Sampling(temperature, top_k, top_p if top_p != 1.0 else None)
    reader = CheckpointReader(resolve(path))
    tokenizer = Tokenizer(reader.read_file(TOKENIZER), reader.folder / TOKENIZER, CheckpointError)
    ids = encode_prompt(tokenizer, prompt, warn)
    model, groups = load_on_rank(reader, rank, 1 if rank is None else rank.world_size)
    assets = Assets.of_checkpoint(reader)
    texts = stream_text(
        model,
        tokenizer,
        assets,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        warn=warn,
        agree=None if groups is None else groups.broadcast_number,
    )
    yield prompt
    yield from texts
    if groups is not None:
        dist.destroy_process_group()


def encode_prompt(tokenizer: Tokenizer, prompt: str, warn: Callable[[str], None]) -> list[int]:
    """A prompt's token ids. Raises ConfigError where it has bytes that are not text."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes that are none
        raise ConfigError("The prompt (--prompt) has bytes that are not UTF-8: give it as text.")
    ids = tokenizer.encode(prompt)
    unknown = UnknownText(tokenizer).count([prompt], np.array(ids), np.array([0, len(ids)]), ["the prompt"])
    if unknown.characters:
        warn(f"The checkpoint's tokenizer has no tokens for {unknown}.")
    return ids


def stream_text(
    model: Decoder,
    tokenizer: Tokenizer,
    assets: Assets,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    warn: Callable[[str], None],
    agree: Callable[[int], int] | None = None,
) -> Iterator[str]:
    """What the model generates after a prompt, each character as soon as it is whole; see `generate_text`.

    Raises ConfigError at once, as `generate` does.
    """
    ids = [*assets.prompt_ids, *prompt_ids]
    room = model.config.max_position_embeddings - len(ids)
    tokens = generate(
        model,
        ids,
        min(max_new_tokens, room) if room > 0 else max_new_tokens,
        sampling,
        seed,
        assets.stop_ids,
        tokenizer.vocab_size,
        agree=agree,
    )

    def stream() -> Iterator[str]:
        new_ids: list[int] = []
        yield from _decode_stream(tokenizer, ids, _collected(tokens, new_ids))
        if len(new_ids) == room < max_new_tokens:
            warn(
                f"The text stops here because the model's context is full: {len(ids)} tokens of prompt and {room} new "
                f"ones are all of its {model.config.max_position_embeddings} positions "
                "(model.max_position_embeddings)."
            )

    return stream()


def _collected(tokens: Iterator[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token


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

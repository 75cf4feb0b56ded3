"""Sampling from a decoder, token by token, with a cache of keys and values.

B: sequences (one here), T: tokens, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.errors import CheckpointError, ConfigError
from megatrain.model.context import KeyValueCache
from megatrain.model.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at ``temperature`` 0, else at random in the order the fields stand here.

    ``top_k``: among the k likeliest; ``top_p``: among the likeliest whose probabilities just reach p (Holtzman et al.
    2020). None: among all. Raises ConfigError where a field has no meaning.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"The temperature is {self.temperature}: it must be 0 (the likeliest token) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: it must be 1 or more.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top_p is {self.top_p}: it must be above 0, and 1 at most. Temperature 0 takes the likeliest token."
            )

    def choose(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """An id, for fp32 logits. Raises CheckpointError where they are no numbers."""
        if not logits_V.max().isfinite():
            raise CheckpointError(
                "The model computes NaN or infinity: its weights are ruined, as by a run that diverged. Take an "
                "earlier checkpoint; `megatrain checkpoint list` shows what a run has."
            )
        if self.temperature == 0.0:
            return int(logits_V.argmax())
        # In double, and from the largest down: a small temperature makes no infinity of the likeliest.
        sorted_V, ids_V = ((logits_V.double() - logits_V.max()) / self.temperature).sort(descending=True)
        if self.top_k is not None:
            sorted_V, ids_V = sorted_V[: self.top_k], ids_V[: self.top_k]
        probabilities_V = sorted_V.softmax(-1)
        if self.top_p is not None:
            before_V = probabilities_V.cumsum(-1) - probabilities_V
            probabilities_V = probabilities_V.where(before_V < self.top_p, 0.0)
        return int(ids_V[torch.multinomial(probabilities_V.cpu(), 1, generator=generator)])


def generate(
    model: Decoder,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    agree: Callable[[int], int] | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, up to ``max_new_tokens``, or up to and without one of ``stop_ids``.

    The model is to be in evaluation mode. Ids from ``vocab_size`` on (the tokenizer's; None: the model's) are never
    chosen. The same arguments give the same tokens. ``agree``: from this rank's choice to that of all ranks that share
    the model; None: there are no others. Raises ConfigError, at once, for an empty prompt, an id or a seed out of
    range, or more tokens than the model has positions.
    """
    limit = model.config.max_position_embeddings
    model_ids = model.config.known_vocab_size
    num_ids = model_ids if vocab_size is None else min(vocab_size, model_ids)
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"The seed is {seed}: it must be from 0 to 2^64 - 1.")
    if not tokens:
        raise ConfigError("The prompt is empty: give at least one token to go on from.")
    if not all(0 <= token < num_ids for token in tokens):
        raise ConfigError(f"The prompt has token ids outside of 0 to {num_ids - 1}: was it made by another tokenizer?")
    if len(tokens) + max_new_tokens > limit:
        room = limit - len(tokens)
        advice = f"ask for at most {room} new tokens, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"The prompt's {len(tokens)} tokens and {max_new_tokens} new ones are more than the model's {limit} "
            f"positions (model.max_position_embeddings): {advice}."
        )
    return _stream(model, tokens, max_new_tokens, sampling, seed, stop_ids, num_ids, agree)


def _stream(
    model: Decoder,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_ids: Collection[int],
    num_ids: int,
    agree: Callable[[int], int] | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(model.config.num_hidden_layers, len(tokens) + max_new_tokens)
    new = list(tokens)
    for _ in range(max_new_tokens):
        token = sampling.choose(next_logits(model, new, cache)[:num_ids], generator)
        if agree is not None:
            token = agree(token)
        if token in stop_ids:
            return
        yield token
        new = [token]


@torch.inference_mode()
def next_logits(model: Decoder, tokens: Sequence[int], cache: KeyValueCache) -> Tensor:
    """fp32 logits [V] of the token after ``tokens``, which follow those in the cache and join them there."""
    device = model.device
    tokens_BT = torch.tensor([list(tokens)], device=device)
    positions_BT = torch.arange(cache.length, cache.length + len(tokens), device=device).unsqueeze(0)
    context = model.make_context(positions_BT, None, None, model.dtype, cache)
    x_BTC = model.hidden(tokens_BT, context)
    cache.advance(len(tokens))
    logits_V: Tensor = model.head(x_BTC[:, -1:])[0, 0].float()
    return logits_V

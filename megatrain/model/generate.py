"""Generation from a decoder, token by token, with a cache of keys and values; several prompts at once.

B: sequences, T: tokens, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatrain.batch import InferenceBatch
from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.model.context import KeyValueCache


class LanguageModel(Protocol):
    """A model in use: whole on a device, or on the ranks that train it.

    ``tokens_at_once``: about how many a batch may have; ``tokens_multiple``: what a batch's tokens a row are to be a
    multiple of.
    """

    tokens_at_once: int
    tokens_multiple: int

    @property
    def config(self) -> ModelConfig: ...

    def infer(self, batch: InferenceBatch) -> Tensor:
        """fp32 logits [N, V] of what comes after each token that the batch asks about; where it has targets,
        `megatrain.model.loss.token_scores` [2, N]. Alike on all ranks that share the model, for which it is collective.
        """
        ...


def require_generative(config: ModelConfig) -> None:
    """Raise ConfigError for a model that reads images, or texts from both sides, and so writes none."""
    if not config.description.can_generate:
        reads = "images" if config.description.reads_images else "a text from both sides"
        raise ConfigError(
            f"A {config.family} reads {reads}, and cannot generate or answer tasks: `megatrain eval "
            "--data` evaluates it."
        )


Agree = Callable[[list[int]], list[int]]
"""From this rank's choices to those of all ranks that share a model."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at ``temperature`` 0, else at random in the order the fields stand here.

    ``repetition_penalty``: what the logits of tokens that are in the prompt or the output are divided by where they are
    positive, and multiplied by where they are negative (Keskar et al. 2019). ``top_k``: among the k likeliest;
    ``top_p``: among the likeliest whose probabilities just reach p (Holtzman et al. 2020). None: among all. Raises
    ConfigError where a field has no meaning.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"The temperature is {self.temperature}: it must be 0 (the likeliest token) or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: it must be 1 or more.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"top_p is {self.top_p}: it must be above 0, and 1 at most. Temperature 0 takes the likeliest token."
            )
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}: it must be above 0 (1: none).")

    def choose(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """An id a row, for fp32 logits. Raises CheckpointError where they are no numbers."""
        refuse_no_numbers(logits_BV)
        if self.temperature == 0.0:
            ids: list[int] = logits_BV.argmax(-1).tolist()
            return ids
        return [self._draw(logits_V, generator) for logits_V, generator in zip(logits_BV, generators, strict=True)]

    def _draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        # In double, and from the largest down: a small temperature makes no infinity of the likeliest.
        sorted_V, ids_V = ((logits_V.double() - logits_V.max()) / self.temperature).sort(descending=True)
        if self.top_k is not None:
            sorted_V, ids_V = sorted_V[: self.top_k], ids_V[: self.top_k]
        probabilities_V = sorted_V.softmax(-1)
        if self.top_p is not None:
            before_V = probabilities_V.cumsum(-1) - probabilities_V
            probabilities_V = probabilities_V.where(before_V < self.top_p, 0.0)
        return int(ids_V[torch.multinomial(probabilities_V.cpu(), 1, generator=generator)])


class Limits(NamedTuple):
    """What ends a row: one of ``stop_ids``, which is left out, or ``max_new_tokens``. Ids from ``num_ids`` on (the
    tokenizer's; None: the model's) are never chosen, nor are ``suppress_ids``: their logits are minus infinity."""

    max_new_tokens: int
    stop_ids: Collection[int] = ()
    num_ids: int | None = None
    suppress_ids: Collection[int] = ()

    def masked(self, logits_BV: Tensor) -> Tensor:
        """The logits of what can be chosen."""
        logits_BV = logits_BV[:, : self.num_ids]
        if not self.suppress_ids:
            return logits_BV
        index = torch.tensor(list(self.suppress_ids), device=logits_BV.device)
        return logits_BV.index_fill(1, index, -math.inf)

    def of(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Limits:
        """The same with the ids of the model. Raises ConfigError for an empty prompt, an id out of range, or more
        tokens than the model has positions."""
        limit, model_ids = model.config.max_position_embeddings, model.config.known_vocab_size
        num_ids = model_ids if self.num_ids is None else min(self.num_ids, model_ids)
        for tokens in prompts:
            if not tokens:
                raise ConfigError("The prompt is empty: give at least one token to go on from.")
            if not all(0 <= token < num_ids for token in tokens):
                raise ConfigError(
                    f"The prompt has token ids outside of 0 to {num_ids - 1}: was it made by another tokenizer?"
                )
            if len(tokens) + self.max_new_tokens > limit:
                room = limit - len(tokens)
                advice = (
                    f"ask for at most {room} new tokens, or shorten the prompt" if room > 0 else "shorten the prompt"
                )
                raise ConfigError(
                    f"The prompt's {len(tokens)} tokens and {self.max_new_tokens} new ones are more than the model's "
                    f"{limit} positions (model.max_position_embeddings): {advice}."
                )
        return self._replace(num_ids=num_ids)


def generate(
    model: LanguageModel,
    tokens: Sequence[int],
    limits: Limits,
    sampling: Sampling,
    seed: int = 0,
    agree: Agree | None = None,
) -> Iterator[int]:
    """`generate_batch` for one prompt: yield new tokens one by one."""
    steps = generate_batch(model, [tokens], limits, sampling, seed, agree)
    return (token for step in steps for token in step if token is not None)


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sampling: Sampling,
    seed: int = 0,
    agree: Agree | None = None,
    ended: set[int] | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> Iterator[list[int | None]]:
    """Yield each prompt's next token, step by step; None for those that have ended.

    The model is to be in evaluation mode. The same arguments give the same tokens, and each prompt those that it would
    get by itself. ``ended``: prompts that get no more tokens; the caller may add to it between steps. ``agree``: None
    where no other ranks share the model. ``sources``: what an encoder reads for each, if there is one. Raises
    ConfigError, at once, for a seed out of range and as `Limits.of` does.
    """
    if not 0 <= seed < 1 << 64:
        raise ConfigError(f"The seed is {seed}: it must be from 0 to 2^64 - 1.")
    limits, ended = limits.of(model, prompts), set() if ended is None else ended
    cache = make_cache(model, prompts, limits, sources)
    return _steps(model, prompts, cache, limits, sampling, seed, agree, ended)


def _steps(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cache: KeyValueCache,
    limits: Limits,
    sampling: Sampling,
    seed: int,
    agree: Agree | None,
    ended: set[int],
) -> Iterator[list[int | None]]:
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    seen = SeenTokens(prompts, sampling.repetition_penalty)
    active, new = list(range(len(prompts))), [list(tokens) for tokens in prompts]
    for _ in range(limits.max_new_tokens):
        going_on = [place for place, row in enumerate(active) if row not in ended]
        active, new = [active[place] for place in going_on], [new[place] for place in going_on]
        if not active:
            return
        cache.select(going_on)
        logits_BV = seen.penalize(limits.masked(next_logits(model, new, cache)), active)
        chosen = sampling.choose(logits_BV, [generators[row] for row in active])
        chosen = chosen if agree is None else agree(chosen)
        ended |= {row for row, token in zip(active, chosen, strict=True) if token in limits.stop_ids}
        step: list[int | None] = [None] * len(prompts)
        for row, token in zip(active, chosen, strict=True):
            if row not in ended:
                step[row] = token
                seen.add(row, token)
        if not ended.issuperset(active):
            yield step
        new = [[token] for token in chosen]


class SeenTokens:
    """The ids in each prompt and what follows it, for the repetition penalty; without one nothing is looked at."""

    def __init__(self, prompts: Iterable[Sequence[int]], penalty: float) -> None:
        self._penalty = penalty
        self._ids = [dict.fromkeys(tokens) for tokens in prompts] if penalty != 1.0 else []

    def add(self, row: int, token: int) -> None:
        if self._ids:
            self._ids[row][token] = None

    def penalize(self, scores_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """The scores of ``rows`` with the penalty on what each has seen."""
        if not self._ids:
            return scores_BV
        scores_BV = scores_BV.clone()
        for scores_V, row in zip(scores_BV, rows, strict=True):
            ids = torch.tensor(list(self._ids[row]), device=scores_V.device)
            found = scores_V[ids]
            scores_V[ids] = torch.where(found < 0, found * self._penalty, found / self._penalty)
        return scores_BV


def make_cache(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    sources: Sequence[Sequence[int]] | None = None,
) -> KeyValueCache:
    """With room for the prompts, what is to follow them, and padding; and with the sources that an encoder is still to
    read. Raises ConfigError for a source that is empty, longer than the model's positions, or has ids out of range."""
    capacity = max(map(len, prompts), default=0) + limits.max_new_tokens + model.tokens_multiple - 1
    config = model.config
    longest = config.max_position_embeddings
    for source in sources or ():
        if not 0 < len(source) <= longest:
            raise ConfigError(
                f"A source has {len(source)} tokens: it must have 1 to {longest} (model.max_position_embeddings)."
            )
        if not 0 <= min(source) <= max(source) < (config.vocab_size or 0):
            raise ConfigError(
                f"A source has token ids outside of 0 to {(config.vocab_size or 0) - 1}: was it made by another "
                "tokenizer?"
            )
    return KeyValueCache(config.num_layers(config.description.decoder), capacity, len(prompts), sources)


def next_logits(model: LanguageModel, tokens: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
    """fp32 logits [B, V] of what comes after each row's ``tokens``, which follow those in the cache and join them."""
    sizes = [len(row) for row in tokens]
    tokens_BT, positions_BT = pad_rows(model, tokens, cache.lengths)
    last_B = torch.tensor(sizes) - 1
    batch = InferenceBatch(tokens_BT, positions_BT, torch.arange(len(sizes)), last_B, cache=cache)
    if cache.sources is not None and cache.encoded is None:
        tokens_BS, _ = pad_rows(model, cache.sources)
        batch = batch._replace(source_tokens_BS=tokens_BS, source_lengths_B=torch.tensor([*map(len, cache.sources)]))
    logits_BV = model.infer(batch)
    cache.advance(sizes)
    return logits_BV


def pad_rows(
    model: LanguageModel, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and their positions, [B, T] each, padded on the right; ``starts``: the first position of each row."""
    longest = max(map(len, rows))
    width = longest + -longest % model.tokens_multiple
    tokens_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    positions_BT = torch.tensor([[start] for start in starts or [0] * len(rows)]) + torch.arange(width)
    return tokens_BT, positions_BT.clamp_(max=model.config.max_position_embeddings - 1)


def refuse_no_numbers(logits_BV: Tensor) -> None:
    """Raise CheckpointError where a row of logits has NaN or infinity."""
    if not logits_BV.amax(-1).isfinite().all():
        raise CheckpointError(
            "The model computes NaN or infinity: its weights are ruined, as by a run that diverged. Take an "
            "earlier checkpoint; `megatrain checkpoint list` shows what a run has."
        )

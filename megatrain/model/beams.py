"""Beam search: the likeliest sequences as a whole, by the rules and with the scores of Hugging Face's ``generate``.

B: prompts, K: beams of a prompt, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.generate import (
    Agree,
    LanguageModel,
    Limits,
    SeenTokens,
    make_cache,
    next_logits,
    refuse_no_numbers,
)


@dataclass(frozen=True)
class BeamSearch:
    """``num_beams``: sequences that are followed at once. A sequence's score is its log-probability divided by its
    length (new tokens, the one that ends it included) to the power of ``length_penalty``: above 0 longer ones gain.

    ``early_stopping``: True ends a prompt as soon as it has ``num_beams`` sequences that have ended; False, where the
    best that goes on scores less than the worst of those, at its present length; "never", where it cannot score more
    at any length.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ConfigError(f"num_beams is {self.num_beams}: it must be 1 or more.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty is {self.length_penalty}: it must be a finite number.")


class Hypothesis(NamedTuple):
    """New tokens without the one that ended them, and their score."""

    tokens: tuple[int, ...]
    score: float


class _Beam(NamedTuple):
    tokens: tuple[int, ...]
    log_probability: float


@dataclass
class _Prompt:
    """The beams of a prompt, and what has ended, best first."""

    search: BeamSearch
    limits: Limits
    beams: list[_Beam]
    ended: list[Hypothesis] = field(default_factory=list)

    def take(self, candidates: Sequence[tuple[float, int, int]]) -> list[int]:
        """Go on with the best of ``candidates`` (log-probability, beam, token; best first) that do not end; the beams
        that these continue. Of the first ``num_beams`` those that end are kept."""
        search, length = self.search, len(self.beams[0].tokens) + 1
        is_last = length == self.limits.max_new_tokens
        is_full = search.early_stopping is True and len(self.ended) == search.num_beams
        going_on: list[tuple[int, _Beam]] = []
        for rank, (log_probability, beam, token) in enumerate(candidates):
            before = self.beams[beam].tokens
            stops = token in self.limits.stop_ids
            if not stops:
                going_on.append((beam, _Beam((*before, token), log_probability)))
            if (stops or is_last) and rank < search.num_beams and not is_full:
                tokens = before if stops else (*before, token)
                self.ended.append(Hypothesis(tokens, log_probability / length**search.length_penalty))
        self.ended = sorted(self.ended, key=lambda each: -each.score)[: search.num_beams]
        going_on = going_on[: search.num_beams]
        self.beams = [each for _, each in going_on]
        return [beam for beam, _ in going_on]

    @property
    def is_over(self) -> bool:
        """Whether nothing that goes on can become better than what has ended."""
        search, length = self.search, len(self.beams[0].tokens)
        if length == self.limits.max_new_tokens:
            return True
        if len(self.ended) < search.num_beams:
            return False
        if search.early_stopping is True:
            return True
        if search.early_stopping == "never" and search.length_penalty > 0.0:
            length = self.limits.max_new_tokens
        return bool(self.beams[0].log_probability / length**search.length_penalty <= self.ended[-1].score)


def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    search: BeamSearch,
    repetition_penalty: float = 1.0,
    agree: Agree | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[Hypothesis]]:
    """Each prompt's ``num_beams`` best sequences, best first; each prompt's are those that it would get by itself.

    The model is to be in evaluation mode. ``sources``: as in `generate_batch`. Raises ConfigError as `Limits.of` does,
    and for more beams than there are tokens to begin with.
    """
    limits = limits.of(model, prompts)
    num_beams = search.num_beams
    if num_beams > (limits.num_ids or 0):
        raise ConfigError(f"num_beams is {num_beams}, and there are {limits.num_ids} tokens: give fewer beams.")
    if limits.max_new_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    cache = make_cache(model, prompts, limits, sources)
    states = [_Prompt(search, limits, [_Beam((), 0.0)]) for _ in prompts]
    active, new = list(range(len(prompts))), [list(tokens) for tokens in prompts]
    while active:
        of_active = [states[row] for row in active]
        whole = (
            [*prompts[row], *beam.tokens] for row, state in zip(active, of_active, strict=True) for beam in state.beams
        )
        seen = SeenTokens(whole, repetition_penalty)
        chosen = _candidates(limits.masked(next_logits(model, new, cache)), of_active, seen, agree)
        rows: list[int] = []
        first, still = 0, []
        for row, state, candidates in zip(active, of_active, chosen, strict=True):
            num_rows = len(state.beams)
            continued = state.take(candidates)
            if not state.is_over:
                rows += [first + beam for beam in continued]
                still.append(row)
            first += num_rows
        active = still
        if active:
            cache.select(rows)
        new = [[beam.tokens[-1]] for row in active for beam in states[row].beams]
    return [state.ended for state in states]


def _candidates(
    logits_NV: Tensor, states: Sequence[_Prompt], seen: SeenTokens, agree: Agree | None
) -> list[list[tuple[float, int, int]]]:
    """Of each prompt the best continuations of its beams, so many that enough are left where some end."""
    refuse_no_numbers(logits_NV)
    scores_NV = seen.penalize(logits_NV.log_softmax(-1), range(len(logits_NV)))
    before = [beam.log_probability for state in states for beam in state.beams]
    scores_NV = scores_NV + torch.tensor(before, device=scores_NV.device).unsqueeze(1)
    (limits, search), num_ids, found = (states[0].limits, states[0].search), scores_NV.shape[1], []
    for scores_KV in torch.split(scores_NV, [len(state.beams) for state in states]):
        count = min(max(2, 1 + len(set(limits.stop_ids))) * search.num_beams, scores_KV.numel())
        flat = scores_KV.flatten()
        indices: list[int] = flat.topk(count).indices.tolist()
        indices = indices if agree is None else agree(indices)
        values: list[float] = flat[indices].tolist()
        found.append([(value, *divmod(index, num_ids)) for value, index in zip(values, indices, strict=True)])
    return found

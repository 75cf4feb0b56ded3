"""What a model answers: log-likelihoods of texts after a prompt, in batches by length, shared out to the ranks.

B: sequences in a batch, T: tokens, N: scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from megatrain.batch import InferenceBatch
from megatrain.inference.writer import batches_by_length
from megatrain.model.generate import LanguageModel, pad_rows


class Request(NamedTuple):
    """Token ids: ``continuation``, at least one, is scored after ``context``, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """``log_likelihood``: of all tokens of the continuation together, in nats. ``is_greedy``: each of them is the
    likeliest after those before it."""

    log_likelihood: float
    is_greedy: bool


def score(
    model: LanguageModel, requests: Sequence[Request], advance: Callable[[int], None] = lambda count: None
) -> list[Score]:
    """The score of each request, in their order. ``advance``: called with how many are done since the last call.

    A score does not depend on what is beside it: rows are padded on the right, where causal attention never looks.
    """
    scores: list[Score | None] = [None] * len(requests)
    lengths = [len(request.context) + len(request.continuation) - 1 for request in requests]
    for numbers in batches_by_length(lengths, model.tokens_at_once):
        for number, found in zip(numbers, _score_batch(model, [requests[n] for n in numbers]), strict=True):
            scores[number] = found
        advance(len(numbers))
    return [found for found in scores if found is not None]


def _score_batch(model: LanguageModel, requests: Sequence[Request]) -> Iterable[Score]:
    tokens_BT, positions_BT = pad_rows(model, [[*r.context, *r.continuation][:-1] for r in requests])
    rows_N = torch.tensor([b for b, request in enumerate(requests) for _ in request.continuation])
    columns_N = torch.tensor([len(r.context) - 1 + i for r in requests for i in range(len(r.continuation))])
    targets_N = torch.tensor([token for r in requests for token in r.continuation])
    scores_2N = model.infer(InferenceBatch(tokens_BT, positions_BT, rows_N, columns_N, targets_N)).cpu()
    parts = torch.split(scores_2N, [len(request.continuation) for request in requests], dim=1)
    return [Score(float(scores.double().sum()), bool(likeliest.all())) for scores, likeliest in parts]

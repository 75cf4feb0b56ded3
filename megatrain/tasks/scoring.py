"""What a model answers: log-likelihoods of texts after a prompt, in batches by length, shared out to the ranks.

B: sequences in a batch, T: tokens, C: channels, V: vocabulary, N: scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatrain.inference.writer import batches_by_length
from megatrain.model.decoder import Decoder

TOKENS_AT_ONCE = 8192


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
    model: Decoder, requests: Sequence[Request], advance: Callable[[int], None] = lambda count: None
) -> list[Score]:
    """The score of each request, in their order. ``advance``: called with how many are done since the last call.

    A score does not depend on what is beside it: rows are padded on the right, where causal attention never looks.
    """
    scores: list[Score | None] = [None] * len(requests)
    lengths = [len(request.context) + len(request.continuation) - 1 for request in requests]
    for numbers in batches_by_length(lengths, TOKENS_AT_ONCE):
        for number, found in zip(numbers, _score_batch(model, [requests[n] for n in numbers]), strict=True):
            scores[number] = found
        advance(len(numbers))
    return [found for found in scores if found is not None]


@torch.inference_mode()
def _score_batch(model: Decoder, requests: Sequence[Request]) -> Iterable[Score]:
    rows = [[*request.context, *request.continuation] for request in requests]
    width = max(len(row) for row in rows) - 1
    tokens_BT = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in rows], device=model.device)
    positions_BT = torch.arange(width, device=model.device).expand_as(tokens_BT)
    x_BTC = model.hidden(tokens_BT, model.make_context(positions_BT, None, None, model.dtype))
    row_N = [b for b, request in enumerate(requests) for _ in request.continuation]
    column_N = [len(r.context) - 1 + i for r in requests for i in range(len(r.continuation))]
    targets_N = torch.tensor([token for r in requests for token in r.continuation], device=model.device)
    scores_N, is_likeliest_N = _token_scores(model, x_BTC[row_N, column_N], targets_N)
    sizes = [len(request.continuation) for request in requests]
    of_requests = zip(torch.split(scores_N.cpu(), sizes), torch.split(is_likeliest_N.cpu(), sizes), strict=True)
    return [Score(float(scores.double().sum()), bool(likeliest.all())) for scores, likeliest in of_requests]


def _token_scores(model: Decoder, x_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each target in fp32, and whether it is the likeliest."""
    logits_NV = model.head(x_NC[None])[0].float()
    scores_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    return scores_N, logits_NV.argmax(-1) == targets_N

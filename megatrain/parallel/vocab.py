"""The vocabulary cut among tensor ranks: embedding, output head and cross-entropy. No rank that trains has all logits.

The vocabulary is padded to a multiple of the ranks; padding rows are zero, get no gradient, and no probability.

B: sequences, T: tokens, N: B * T, C: channels, V: this rank's part of the vocabulary, padding included, S: sums.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatrain.distributed.fragment import ShardSpec
from megatrain.fp32 import softmax_blocks, sum_of_rows
from megatrain.parallel.collectives import reduce_from_tensor_parallel_region
from megatrain.parallel.linear import Region


class VocabParallelEmbedding(nn.Module):
    """Looks up the tokens of this rank's part of the vocabulary; the sum over the ranks is the embedding."""

    def __init__(self, embedding: nn.Module, spec: ShardSpec, region: Region) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.dropout, self.scale = embedding.dropout, embedding.scale
        self._range, self._group = _vocabulary(spec), region.group

    def forward(self, tokens_BT: Tensor, context: Any) -> Tensor:
        """[B, T, C], alike on all ranks."""
        first, count = self._range
        local_BT = tokens_BT - first
        is_here_BT = (local_BT >= 0) & (local_BT < count)
        x_BTC = functional.embedding(local_BT * is_here_BT, self.weight)  # type: ignore[arg-type]
        x_BTC = reduce_from_tensor_parallel_region(x_BTC * is_here_BT.unsqueeze(-1), self._group)
        x_BTC = x_BTC if self.scale == 1.0 else x_BTC * self.scale  # type: ignore[operator]
        return x_BTC if self.dropout is None else self.dropout(x_BTC, context.sample_ids_B)  # type: ignore[operator, no-any-return]


class VocabParallelHead(nn.Module):
    """The output head over this rank's part of the vocabulary, with the loss or the logits over all of it."""

    def __init__(self, head: nn.Module, spec: ShardSpec, region: Region) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.label_smoothing: float = head.label_smoothing  # type: ignore[assignment]
        self._range, self._region = _vocabulary(spec), region
        self._num_ids = spec.global_shape[0]

    def loss_sum(self, x_BTC: Tensor, targets_BT: Tensor, loss_mask_BT: Tensor | None) -> Tensor:
        """Sum over the scored targets of their cross-entropy in nats: an fp32 scalar, alike on all ranks."""
        loss: Tensor = self(x_BTC, targets_BT, loss_mask_BT)
        return loss

    def forward(
        self,
        x_BTC: Tensor,
        targets_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Without targets: the logits of the whole vocabulary, alike on all ranks, without gradients; with ``at``, rows
        and columns, of these tokens alone: [N, V]. With targets: what ``loss_sum`` says."""
        if targets_BT is None:
            return self._logits(x_BTC, at)
        mask_N = None if loss_mask_BT is None else loss_mask_BT.flatten()
        share = self.label_smoothing / self._num_ids if self.training else 0.0
        vocabulary = _Vocabulary(*self._range, self._num_ids, share)
        loss: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_BTC, self.weight, self.bias, targets_BT.flatten(), mask_N, vocabulary, self._region
        )
        return loss

    def _logits(self, x_BTC: Tensor, at: tuple[Tensor, Tensor] | None) -> Tensor:
        group, x_BTC = self._region.group, self._region.whole(x_BTC)
        local = functional.linear(x_BTC if at is None else x_BTC[at], self.weight, self.bias)  # type: ignore[arg-type]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local, group=group)
        return torch.cat(parts, -1)[..., : self._num_ids]  # the padding lies behind the last id


class _Vocabulary(NamedTuple):
    """``first``, ``num_here``: the ids that this rank holds, of ``num_ids``. ``share``: what smoothing gives each id of
    a target's probability."""

    first: int
    num_here: int
    num_ids: int
    share: float


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum over n of logsumexp(x_n W^T + b) - (x_n W^T + b)[target_n], where rows of W and b are spread over the ranks.

    Each rank sends its largest logit, its sum of exponentials and, if it has it, the target's logit: 3 numbers a token;
    of smoothed labels the sum of its logits too.
    x is this rank's tokens under sequence parallelism, else all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        mask_N: Tensor | None,
        vocabulary: _Vocabulary,
        region: Region,
    ) -> Tensor:
        (first, count, num_ids, share), group = vocabulary, region.group
        x_NC = region.whole(x_BTC).flatten(0, 1)
        logits_NV = x_NC @ weight_VC.t()
        if bias_V is not None:
            logits_NV += bias_V
        logits_NV[:, count:].fill_(-math.inf)
        if count:
            largest_N = logits_NV.amax(-1).float()
        else:
            largest_N = torch.full((len(x_NC),), -math.inf, dtype=torch.float32, device=x_NC.device)
        dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
        local_N = targets_N - first
        is_here_N = (local_N >= 0) & (local_N < count)
        local_N = local_N * is_here_N
        num_sums = 3 if share else 2
        sums_SN = torch.zeros((num_sums, len(x_NC)), dtype=torch.float32, device=x_NC.device)
        for rows in softmax_blocks(logits_NV):
            shifted_NV = logits_NV[rows] - largest_N[rows].unsqueeze(-1)  # in fp32: the wider type wins
            sums_SN[1, rows] = shifted_NV.gather(-1, local_N[rows].unsqueeze(-1)).squeeze(-1).nan_to_num(neginf=0.0)
            if share:
                sums_SN[2, rows] = shifted_NV[:, :count].sum(-1)
            sums_SN[0, rows] = shifted_NV.exp_().sum(-1)
        sums_SN[1].mul_(is_here_N)
        dist.all_reduce(sums_SN, group=group)
        losses_N = sums_SN[0].log() - sums_SN[1]
        if share:
            losses_N += share * (num_ids * sums_SN[1] - sums_SN[2])
        if any(ctx.needs_input_grad):
            normalizer_N1 = (largest_N + sums_SN[0].log()).unsqueeze(-1)
            for rows in softmax_blocks(logits_NV):
                _gradients(logits_NV[rows], local_N[rows], is_here_N[rows], normalizer_N1[rows], vocabulary)
            if mask_N is not None:
                logits_NV.mul_(mask_N.unsqueeze(-1))
            ctx.region = region
            ctx.save_for_backward(x_BTC, weight_VC, logits_NV)
        return (losses_N if mask_N is None else losses_N * mask_N).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_VC, grad_NV = ctx.saved_tensors
        grad_BTV = grad_NV.unflatten(0, (len(x_BTC), -1))
        grads = ctx.region.gradients([grad_BTV], x_BTC, [weight_VC], ctx.needs_input_grad[:2], grad)
        grad_bias_V = sum_of_rows(grad_NV, grad) if ctx.needs_input_grad[2] else None
        return *grads, grad_bias_V, None, None, None, None


def _gradients(
    logits_NV: Tensor, targets_N: Tensor, is_here_N: Tensor, normalizer_N1: Tensor, vocabulary: _Vocabulary
) -> None:
    """Write the softmax in place of the logits, minus what the labels are: for the targets that are here, before that
    is rounded."""
    share = vocabulary.share
    targets_N1 = targets_N.unsqueeze(-1)
    log_probabilities_NV = logits_NV - normalizer_N1
    target_N1 = log_probabilities_NV.gather(-1, targets_N1)
    torch.exp(log_probabilities_NV, out=logits_NV)
    if share:
        logits_NV[:, : vocabulary.num_here].copy_(log_probabilities_NV.exp_()[:, : vocabulary.num_here] - share)
    of_others = target_N1.exp() - share if vocabulary.num_here else target_N1.exp()
    gradient_N1 = torch.where(is_here_N.unsqueeze(-1), target_N1.expm1() + (vocabulary.num_ids - 1) * share, of_others)
    logits_NV.scatter_(-1, targets_N1, gradient_N1.to(logits_NV.dtype))


def _vocabulary(spec: ShardSpec) -> tuple[int, int]:
    """First token id and number of ids that a rank holds."""
    return (spec.slices[0].offset[0], spec.slices[0].extent[0]) if spec.slices else (0, 0)

"""The output head and its loss: cross-entropy without ever holding the fp32 logits of all tokens.

B: sequences, T: tokens in a sequence, N: tokens (B * T), C: channels, V: vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatrain.fp32 import scaled, softmax_blocks, sum_of_rows


class OutputHead(nn.Module):
    """Activations to logits, one for each token id.

    ``label_smoothing``: in training, so much of each target's probability is shared out evenly among all ids (Szegedy
    et al. 2016, section 7), as torch's ``cross_entropy`` does.
    """

    label_smoothing = 0.0

    def __init__(self, vocab_size: int, size: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if has_bias else None

    def loss_sum(self, x_BTC: Tensor, targets_BT: Tensor, loss_mask_BT: Tensor | None) -> Tensor:
        """Sum over the scored targets of their cross-entropy in nats: an fp32 scalar."""
        # Through forward, whose hooks gather the weight where a layout keeps it in pieces.
        loss: Tensor = self(x_BTC, targets_BT, loss_mask_BT)
        return loss

    def forward(
        self,
        x_BTC: Tensor,
        targets_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Without targets: logits, in the activations' type; with ``at``, rows and columns, of these tokens alone:
        [N, V]. With targets: what :meth:`loss_sum` says."""
        if targets_BT is None:
            return functional.linear(x_BTC if at is None else x_BTC[at], self.weight, self.bias)
        mask_N = None if loss_mask_BT is None else loss_mask_BT.flatten()
        x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
        smoothing = self.label_smoothing if self.training else 0.0
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_NC, self.weight, self.bias, targets_N, mask_N, smoothing
        )
        return loss


def token_scores(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """[2, N] in fp32: the log-probability of each target, and 1 where none is likelier."""
    logits_NV = logits_NV.float()
    scores_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    return torch.stack([scores_N, (logits_NV.argmax(-1) == targets_N).float()])


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one: sum over n of logsumexp(x_n W^T + b) - (x_n W^T + b)[target_n]; with ``smoothing``
    a share of the mean over all ids in place of that share of the target's.

    The logits exist once, in the type of the weights, and their gradient (softmax minus one-hot) replaces them in
    place; the softmax itself is computed in fp32, a few rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        mask_N: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        logits_NV = x_NC @ weight_VC.t()
        if bias_V is not None:
            logits_NV += bias_V
        needs_gradient = any(ctx.needs_input_grad)
        losses_N = torch.empty(len(x_NC), dtype=torch.float32, device=x_NC.device)
        for rows in softmax_blocks(logits_NV):
            _cross_entropy(logits_NV[rows], targets_N[rows], losses_N[rows], needs_gradient, smoothing)
        if mask_N is not None:
            losses_N.mul_(mask_N)
            if needs_gradient:
                logits_NV.mul_(mask_N.unsqueeze(-1))
        if needs_gradient:
            ctx.save_for_backward(x_NC, weight_VC, logits_NV)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_VC, grad_NV = ctx.saved_tensors
        # The scale goes to the small factors, before the sum over tokens: in fp16 that sum might overflow without it.
        grad_x_NC = scaled(grad_NV @ weight_VC, grad) if ctx.needs_input_grad[0] else None
        grad_weight_VC = grad_NV.t() @ scaled(x_NC, grad) if ctx.needs_input_grad[1] else None
        grad_bias_V = sum_of_rows(grad_NV, grad) if ctx.needs_input_grad[2] else None
        return grad_x_NC, grad_weight_VC, grad_bias_V, None, None, None


def _cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, needs_gradient: bool, smoothing: float
) -> None:
    """Write each row's loss, and in place of its logits their gradient."""
    log_probabilities_NV = torch.log_softmax(logits_NV, -1, dtype=torch.float32)
    target_N1 = log_probabilities_NV.gather(-1, targets_N.unsqueeze(-1))
    torch.neg(target_N1.squeeze(-1), out=losses_N)
    if smoothing:
        losses_N.lerp_(-log_probabilities_NV.mean(-1), smoothing)
    if needs_gradient:
        share = smoothing / logits_NV.shape[-1]  # of the target's probability, for each id
        if smoothing:
            logits_NV.copy_(log_probabilities_NV.exp_().sub_(share))
        else:
            torch.exp(log_probabilities_NV, out=logits_NV)  # rounded as it is written
        # Softmax minus one, before it is rounded: the target's probability may be near one.
        target_N1.expm1_().add_(smoothing - share)
        logits_NV.scatter_(-1, targets_N.unsqueeze(-1), target_N1.to(logits_NV.dtype))

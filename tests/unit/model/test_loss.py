"""Head and cross-entropy in one function: the loss and gradients of F.cross_entropy, in less memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatrain.distributed.fragment import ShardSpec
from megatrain.fp32 import softmax_blocks
from megatrain.model.loss import OutputHead
from megatrain.parallel.linear import Region
from megatrain.parallel.vocab import VocabParallelHead


def head_and_inputs(
    dtype: torch.dtype = torch.float32, num_tokens: int = 96
) -> tuple[OutputHead, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = OutputHead(vocab_size=20000, size=32)
    torch.nn.init.normal_(head.weight, std=0.5)
    x_BTC = torch.randn(2, num_tokens, 32)
    targets_BT = torch.randint(0, 20000, (2, num_tokens))
    mask_BT = torch.rand(2, num_tokens) < 0.7
    return head.to(dtype), x_BTC.to(dtype).requires_grad_(), targets_BT, mask_BT


def cut(head: OutputHead, alone: dist.ProcessGroup) -> VocabParallelHead:
    """Among one rank."""
    spec = ShardSpec.whole("head", head.weight.shape)
    return VocabParallelHead(head, spec, Region(alone, is_sequence_parallel=False))


def reference_loss(
    head: OutputHead, x_BTC: Tensor, targets_BT: Tensor, mask_BT: Tensor | None, smoothing: float = 0.0
) -> Tensor:
    logits = head(x_BTC).float()
    if mask_BT is not None:
        targets_BT = targets_BT.where(mask_BT, -100)
    return functional.cross_entropy(
        logits.flatten(0, 1), targets_BT.flatten(), reduction="sum", label_smoothing=smoothing
    )


@pytest.mark.parametrize("kind", ["whole", "cut"])
@pytest.mark.parametrize(("masked", "smoothing"), [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_fp32_loss_and_gradients_equal_cross_entropy(
    masked: bool, smoothing: float, kind: str, alone: dist.ProcessGroup
) -> None:
    head, x, targets, mask = head_and_inputs()
    head.label_smoothing = smoothing
    assert len(softmax_blocks(x.new_empty(x.shape[0] * x.shape[1], 20000))) > 1
    loss = (cut(head, alone) if kind == "cut" else head).loss_sum(x, targets, mask if masked else None)
    expected = reference_loss(head, x, targets, mask if masked else None, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(loss / 7, [x, head.weight])
    theirs = torch.autograd.grad(expected / 7, [x, head.weight])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_padded_rows_get_no_part_of_smoothed_labels(alone: dist.ProcessGroup) -> None:
    head, x, targets, mask = head_and_inputs(num_tokens=8)
    head.label_smoothing = 0.1
    expected = reference_loss(head, x, targets, mask, 0.1)
    (theirs,) = torch.autograd.grad(expected, [head.weight])
    spec = ShardSpec.whole("head", head.weight.shape)
    head.weight = torch.nn.Parameter(functional.pad(head.weight.detach(), (0, 0, 0, 24)))
    loss = VocabParallelHead(head, spec, Region(alone, is_sequence_parallel=False)).loss_sum(x, targets, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (ours,) = torch.autograd.grad(loss, [head.weight])
    torch.testing.assert_close(ours, functional.pad(theirs, (0, 0, 0, 24)), atol=1e-6, rtol=1e-5)
    assert not ours[20000:].any()


def test_labels_are_smoothed_in_training_alone(alone: dist.ProcessGroup) -> None:
    head, x, targets, mask = head_and_inputs(num_tokens=8)
    head.label_smoothing = 0.1
    for each in (head, cut(head, alone)):
        plain, smoothed = (each.train(mode).loss_sum(x, targets, mask).item() for mode in (False, True))
        assert plain == pytest.approx(reference_loss(head, x, targets, mask).item(), rel=1e-6)
        assert smoothed != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("num_targets", [3, 344])  # bf16 rounds 1/3 by 0.2%, 1/344 by 0.26%
@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_bfloat16_gradients_are_scaled_in_fp32(kind: str, num_targets: int, alone: dist.ProcessGroup) -> None:
    head, x, targets, mask = head_and_inputs(torch.bfloat16)
    exact_head, exact_x, _, _ = head_and_inputs()
    exact_head.load_state_dict(head.state_dict())
    exact_x = x.detach().float().requires_grad_()
    expected = reference_loss(exact_head, exact_x, targets, mask)
    loss = (cut(head, alone) if kind == "cut" else head).loss_sum(x, targets, mask)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    ours = torch.autograd.grad(loss / num_targets, [x, head.weight])
    theirs = torch.autograd.grad(expected / num_targets, [exact_x, exact_head.weight])
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).norm() < 0.01 * reference.norm()
        assert mine.float().flatten() @ reference.flatten() / reference.norm() ** 2 == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("kind", ["whole", "cut"])
def test_the_number_of_blocks_changes_no_gradient(
    kind: str, alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over blocks is no sum in bf16, whose error would grow with their number."""
    head, x, targets, mask = head_and_inputs(torch.bfloat16)
    found = {}
    for num_rows in (192, 96, 12, 3):  # 1, 2, 16 and 64 blocks
        monkeypatch.setattr("megatrain.fp32._softmax_bytes", lambda _, num_rows=num_rows: 4 * 20000 * num_rows)
        loss = (cut(head, alone) if kind == "cut" else head).loss_sum(x, targets, mask)
        found[num_rows] = torch.autograd.grad(loss / 7, [x, head.weight])
    assert all(torch.equal(a, b) for grads in found.values() for a, b in zip(grads, found[192], strict=True))


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_unscored_tokens_get_no_gradient_and_no_loss() -> None:
    head, x, targets, mask = head_and_inputs()
    loss = head.loss_sum(x, targets, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()


def test_a_huge_logit_gives_a_finite_loss() -> None:
    head, x, targets, _ = head_and_inputs()
    loss = head.loss_sum(x * 1000, targets, None)
    assert torch.isfinite(loss)


def test_without_gradients_nothing_is_kept_for_them() -> None:
    head, x, targets, _ = head_and_inputs()
    with torch.no_grad():
        assert not head.loss_sum(x, targets, None).requires_grad
    loss = head.loss_sum(x.detach(), targets, None)
    loss.backward()
    assert head.weight.grad is not None


def test_a_frozen_head_still_passes_the_gradient_on() -> None:
    head, x, targets, _ = head_and_inputs()
    head.requires_grad_(False)
    head.loss_sum(x, targets, None).backward()
    assert x.grad is not None
    assert head.weight.grad is None

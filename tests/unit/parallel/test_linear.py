"""Column-parallel layers on one rank, whose group is itself: what is sent when, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.model.linear import Linear
from megatrain.parallel.linear import ColumnParallel, Region


class Block(nn.Module):
    """Two matrices of one input, the second one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate_proj, self.up_proj = Linear(6, 8, bias=True), Linear(6, 10, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @property
    def linears(self) -> list[Linear]:
        return [self.gate_proj, self.up_proj]


class Order(TorchDispatchMode):
    """Names of products and messages, in the order in which they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm_", "bmm") or function.namespace == "c10d":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def run(alone: dist.ProcessGroup, *, is_sequence_parallel: bool) -> tuple[Block, Tensor, list[Tensor], list[str]]:
    """Both passes: the block, its input, all tensors kept for the backward pass, and that pass's order."""
    block, x = Block(), torch.randn(2, 3, 6, requires_grad=True)
    kept: list[Tensor] = []
    layers = ColumnParallel(Region(alone, is_sequence_parallel))
    with saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        gate, up = layers(block.linears, x, None)
    loss = gate.square().sum() + up.sin().sum()
    with Order() as order:
        loss.backward()
    return block, x, kept, order.names


@pytest.mark.parametrize(
    ("is_sequence_parallel", "messages"),
    [(False, ["allreduce_"]), (True, ["_reduce_scatter_base_"])],
    ids=["tensor", "sequence"],
)
def test_input_gradient_is_sent_before_weight_gradients(alone, is_sequence_parallel, messages):
    *_, order = run(alone, is_sequence_parallel=is_sequence_parallel)
    gathered = ["_allgather_base_"] if is_sequence_parallel else []
    assert order == [*gathered, "mm", "addmm_", *messages, "mm", "mm"]


@pytest.mark.parametrize("is_sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_of_activations_only_this_ranks_input_is_kept(alone, is_sequence_parallel):
    block, x, kept, _ = run(alone, is_sequence_parallel=is_sequence_parallel)
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    assert {saved.data_ptr() for saved in kept} - weights == {x.data_ptr()}


@pytest.mark.parametrize("is_sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_gradients_are_those_of_the_layers_alone(alone, is_sequence_parallel):
    block, x, *_ = run(alone, is_sequence_parallel=is_sequence_parallel)
    expected, y = Block(), x.detach().clone().requires_grad_()
    (expected.gate_proj(y).square().sum() + expected.up_proj(y).sin().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    for mine, theirs in zip(block.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_frozen_weights_cost_no_product(alone):
    block, x = Block().requires_grad_(False), torch.randn(2, 3, 6, requires_grad=True)
    gate, up = ColumnParallel(Region(alone, is_sequence_parallel=True))(block.linears, x, None)
    with Order() as order:
        (gate.sum() + up.sum()).backward()
    assert order.names == ["mm", "addmm_", "_reduce_scatter_base_"]
    assert all(parameter.grad is None for parameter in block.parameters())

"""One of four ranks that run tiny pipelines for test_pipeline.py; it writes what it saw as JSON to its last argument.

Two pipelines of two ranks beside each other, and one of four. A chunk is a matrix and what else a record may carry: a
second float, which not every chunk uses, and numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.pipeline import Field, Pipeline, Record
from tests.runs import die_with_parent

WIDTH = 5
FIELDS = {
    "hidden": Field((2, WIDTH), torch.float32),
    "penalty": Field((2,), torch.float32),
    "count": Field((), torch.int64),
}


def weight_of(stage: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(stage)).requires_grad_()


def micro_batch(index: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(100 + index))


def run_stage(weight: Tensor, stage: int, last: int, record: Record | None, batch: Tensor) -> Record | Tensor:
    """Penalties are added up from stage 1 on, in which they begin; stages are counted."""
    hidden = batch if record is None else record["hidden"]
    penalty = torch.zeros(2) if record is None else record["penalty"]
    count = torch.tensor(0) if record is None else record["count"]
    hidden = torch.tanh(hidden @ weight) + batch  # of which every rank has its own
    penalty = penalty + hidden.square().mean(1) if stage else (hidden * 0).sum(1)
    if stage < last:
        return {"hidden": hidden.t().contiguous().t(), "penalty": penalty, "count": count + 1}
    assert int(count) == stage
    return hidden.sum() + 0.1 * penalty.sum()


class Tiny:
    """A pipeline of ``num_chunks`` a rank, and what happens in it."""

    def __init__(self, group: dist.ProcessGroup, num_chunks: int) -> None:
        p, rank = dist.get_world_size(group), dist.get_rank(group)
        self.stages = [chunk * p + rank for chunk in range(num_chunks)]
        self.last = p * num_chunks - 1
        self.weights = [weight_of(stage) for stage in self.stages]
        self.losses: list[float] = []
        self.flags: list[tuple[int, bool, bool]] = []
        self.num_forward = 0
        self._inputs: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._outputs: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most_inputs = self.most_outputs = 0
        self.pipeline: Pipeline[Tensor] = Pipeline(
            group, num_chunks, torch.device("cpu"), lambda batch, chunk, kind: FIELDS, self.forward, self.backward
        )

    def forward(self, chunk: int, record: Record | None, batch: Tensor) -> Record | Tensor:
        self.num_forward += 1
        result = run_stage(self.weights[chunk], self.stages[chunk], self.last, record, batch)
        if isinstance(result, Tensor):
            self.losses.append(result.item())
        else:
            self._outputs.add(result["hidden"])
        if record is not None:
            self._inputs.add(record["hidden"])
        self.most_inputs = max(self.most_inputs, len(self._inputs))
        self.most_outputs = max(self.most_outputs, len(self._outputs))
        return result

    def backward(self, chunk: int, scalar: Tensor, *, is_last_of_chunk: bool, is_last: bool) -> None:
        self.flags.append((chunk, is_last_of_chunk, is_last))
        torch.autograd.backward(scalar * 1024.0 if self.stages[chunk] < self.last else scalar)


def expected(num_stages: int, num_micro_batches: int) -> tuple[list[Tensor], list[float]]:
    """Gradients and losses, without a pipeline."""
    weights, losses = [weight_of(stage) for stage in range(num_stages)], []
    for index in range(num_micro_batches):
        record: Any = None
        for stage, weight in enumerate(weights):
            record = run_stage(weight, stage, num_stages - 1, record, micro_batch(index))
        torch.autograd.backward(record)
        losses.append(record.item())
    return [weight.grad for weight in weights if weight.grad is not None], losses


def train(group: dist.ProcessGroup, num_chunks: int, num_micro_batches: int) -> dict[str, Any]:
    """Two steps, of which the second has one micro-batch less where it can."""
    tiny = Tiny(group, num_chunks)
    error = 0.0
    for m in (num_micro_batches, max(num_micro_batches - 1, 1)):
        tiny.losses.clear()
        tiny.flags.clear()
        for weight in tiny.weights:
            weight.grad = None
        tiny.pipeline.train([micro_batch(index) for index in range(m)])
        gradients, losses = expected(tiny.last + 1, m)
        for stage, weight in zip(tiny.stages, tiny.weights, strict=True):
            assert weight.grad is not None
            error = max(error, float((weight.grad - gradients[stage]).abs().max() / gradients[stage].abs().max()))
        if tiny.last in tiny.stages:
            error = max(error, *(abs(a - b) / abs(b) for a, b in zip(tiny.losses, losses, strict=True)))
        counts = Counter(chunk for chunk, _, _ in tiny.flags)
        assert set(counts.values()) == {m} and len(counts) == num_chunks
        for chunk in range(num_chunks):
            assert [end for at, end, _ in tiny.flags if at == chunk] == [False] * (m - 1) + [True]
        assert [end for _, _, end in tiny.flags] == [False] * (m * num_chunks - 1) + [True]
    return {"error": error, "most_inputs": tiny.most_inputs, "most_outputs": tiny.most_outputs}


def evaluate(group: dist.ProcessGroup, num_chunks: int, num_micro_batches: int) -> dict[str, Any]:
    """A stream of micro-batches; the most that were asked for and had not begun, and what was held of them."""
    tiny = Tiny(group, num_chunks)
    ahead = 0

    def stream() -> Iterator[Tensor]:
        nonlocal ahead
        for index in range(num_micro_batches):
            ahead = max(ahead, index + 1 - tiny.num_forward // num_chunks)
            yield micro_batch(index)

    tiny.pipeline.evaluate(stream())
    _, losses = expected(tiny.last + 1, num_micro_batches)
    if tiny.last in tiny.stages:
        assert torch.allclose(torch.tensor(tiny.losses), torch.tensor(losses))
    assert tiny.num_forward == num_chunks * num_micro_batches and not tiny.flags
    return {"ahead": ahead, "most_inputs": tiny.most_inputs, "most_outputs": tiny.most_outputs}


def main() -> None:
    die_with_parent()
    rank, port, path = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=4, timeout=timedelta(seconds=60))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    alone = [dist.new_group([each]) for each in range(4)]
    assert groups[4] is not None
    seen: dict[str, Any] = {"1-1-3": train(alone[rank], 1, 3)}
    for p, v, m in itertools.product((2, 4), (1, 2, 3), (1, 2, 3, 5, 8)):
        seen[f"{p}-{v}-{m}"] = train(groups[p], v, m)
    for p, v in itertools.product((2, 4), (1, 2)):
        seen[f"{p}-{v}-long"] = train(groups[p], v, 32)
        seen[f"{p}-{v}-evaluation"] = evaluate(groups[p], v, 23)
    path.write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

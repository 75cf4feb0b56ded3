"""Work space of the softmax over the vocabulary: as large as the device makes it worth."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatrain import fp32
from megatrain.plan.activations import LARGEST_SOFTMAX_BYTES


@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (1000, 7), (300, 50_000), (3, 10_000_000), (5, 0)])
def test_blocks_cover_each_row_once_within_bounds(num_rows, width):
    blocks = fp32.softmax_blocks(torch.empty(num_rows, width, device="meta"))
    rows = [row for block in blocks for row in range(num_rows)[block]]
    assert rows == list(range(num_rows))
    for block in blocks:
        size = len(range(num_rows)[block])
        assert size == 1 or 4 * size * width <= 4 << 20


@pytest.mark.parametrize(("gib", "mib"), [(16, 64), (24, 96), (80, 256), (192, 256)])
def test_gpus_get_blocks_by_their_memory(gib, mib, monkeypatch):
    """Without a GPU: what torch says of one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib << 30))
    assert fp32._softmax_bytes.__wrapped__(torch.device("cuda", 0)) == mib << 20 <= LARGEST_SOFTMAX_BYTES

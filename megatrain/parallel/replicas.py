"""Weights that several ranks must hold alike, compared by checksum: what a faulty device or memory changed is found.

One number a rank is compared, in messages whose size does not depend on the number of ranks; only where they differ
are those of all ranks gathered, to see which differs.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.distributed.fragment import ShardSpec
from megatrain.distributed.groups import Groups

_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = 2**62 - 1


class Replicas(NamedTuple):
    """Tensors by name that all ranks of a group must hold alike. ``may_drift``: each rank computes them by itself, and
    kernels or sums that round otherwise may make them differ, not only a fault."""

    group: dist.ProcessGroup
    tensors: dict[str, Tensor]
    may_drift: bool = False


class Difference(NamedTuple):
    """``odd``: the ranks of ``ranks``, which must all hold the same, that hold other values of ``names``."""

    odd: tuple[int, ...]
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    may_drift: bool

    def text(self, hosts: Sequence[str]) -> str:
        """In words; ``hosts``: of every rank."""
        what = self.names[0] + (f" and {len(self.names) - 1} more" if len(self.names) > 1 else "")
        odd = ", ".join(f"{rank} ({hosts[rank]})" for rank in self.odd)
        if self.odd == self.ranks:
            return f"ranks {odd} differ in {what}, and which of them is wrong cannot be told"
        return f"rank {odd} differs in {what} from {len(self.ranks) - len(self.odd)} others that must hold the same"


class Differences(NamedTuple):
    """``text``: who differs from whom in what. ``may_drift``: all of it may be rounding."""

    text: str
    may_drift: bool


def tensor_replicas(specs: Mapping[str, ShardSpec], groups: Groups) -> Iterator[tuple[dist.ProcessGroup, list[str]]]:
    """The parameters that tensor ranks hold alike, and which: all of them, or those with the same key-value heads."""
    copies = {name: spec.num_replicas for name, spec in specs.items() if spec.num_replicas > 1}
    size = groups.topology.tensor
    yield groups.tensor, [name for name, number in copies.items() if number == size]
    yield groups.kv_replica_group, [name for name, number in copies.items() if number < size]


@torch.no_grad()
def find_differences(replicas: Iterable[Replicas], groups: Groups) -> Differences | None:
    """Which ranks hold something else than the others; None where none does. Collective."""
    own = [found for each in replicas if (found := _compare(each, groups.device)) is not None]
    if not groups.all_reduce_sum([float(len(own))])[0]:
        return None
    every = groups.all_gather_object((own, socket.gethostname()))
    hosts = [host for _, host in every]
    differences = list(dict.fromkeys(found for each, _ in every for found in each))
    text = "; ".join(difference.text(hosts) for difference in differences)
    return Differences(text, all(difference.may_drift for difference in differences))


@torch.no_grad()
def mend(replicas: Iterable[Replicas], groups: Groups) -> None:
    """Where ranks that must hold the same do not, give all of them what most hold; what the first one holds, where none
    has a majority. Collective."""
    for each in replicas:
        if (found := _compare(each, groups.device)) is not None:
            source = next((rank for rank in found.ranks if rank not in found.odd), found.ranks[0])
            for tensor in each.tensors.values():
                sent = tensor.to(groups.device).contiguous()
                dist.broadcast(sent, source, group=each.group)
                tensor.copy_(sent)


def checksum(tensor: Tensor) -> Tensor:
    """A number below 2^62 (int64, no dimension) that any change of a single bit changes."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) & _MASK


def odd_ones_out(values: Sequence[int]) -> list[int]:
    """The places of the values that differ from the most frequent one; all where no value is more frequent."""
    counts = Counter(values).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return list(range(len(values)))
    return [place for place, value in enumerate(values) if value != counts[0][0]]


def _compare(replicas: Replicas, device: torch.device) -> Difference | None:
    """What differs in this rank's group; the same on all of its ranks."""
    ranks = tuple(dist.get_process_group_ranks(replicas.group))
    if len(ranks) == 1 or not replicas.tensors:
        return None
    sums = torch.stack([checksum(tensor).to(device) for tensor in replicas.tensors.values()])
    factors = torch.arange(1, 2 * len(sums), 2, device=device)  # odd ones: none loses a bit
    whole = (sums * factors).sum() & _MASK
    extremes = torch.stack([whole, -whole])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=replicas.group)
    if bool(extremes[0] == -extremes[1]):
        return None
    every = [torch.empty_like(sums) for _ in ranks]
    dist.all_gather(every, sums, group=replicas.group)
    odd = {
        name: odd_ones_out(column)
        for name, column in zip(replicas.tensors, torch.stack(every, 1).tolist(), strict=True)
    }
    places = sorted({place for each in odd.values() for place in each})
    names = tuple(name for name in odd if odd[name])
    return Difference(tuple(ranks[place] for place in places), ranks, names, replicas.may_drift)

"""Ranks and their hosts in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_MOST_NAMED = 4


def name_ranks(ranks: Iterable[tuple[int, str]]) -> str:
    """``rank 3 on node2, rank 4 on node2``; of many how many there are on each host."""
    pairs = list(ranks)
    if len(pairs) > _MOST_NAMED:
        hosts = Counter(host for _, host in pairs)
        return f"{len(pairs)} ranks on {', '.join(f'{host} ({num})' for host, num in hosts.most_common(_MOST_NAMED))}"
    return ", ".join(f"rank {rank} on {host}" for rank, host in pairs)

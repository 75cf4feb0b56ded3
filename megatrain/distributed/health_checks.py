"""What the readings of all ranks say: which rank, node or link is bad, and how."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from megatrain.distributed.naming import name_ranks
from megatrain.units import format_bytes

RESULT = "megatrain-doctor-result "
"""What the doctor's one line begins with, wherever a launcher puts a name before it."""
STARTED = "megatrain-doctor-started "
"""What a node's first rank says before: it has started, and waits for the others for so many seconds."""
_SLOW = 2.0
"""A disk or link is slow that takes more than so many times what the median one takes."""
_SLOW_RANK = 2.5
"""So is a rank, which may have had to share its cores for a moment."""
_CLOCK_SECONDS = 2.0
_FLOOR = 0.2
"""And more than this share of what is slow by itself: below it no step is held up."""
_SLOW_LATENCY_SECONDS, _SLOW_WRITE_SECONDS, _SLOW_EXCHANGE_SECONDS = 0.01, 1.0, 0.05
_SLOW_DISK, _SLOW_LINK = 5e6, 30e6
"""Bytes a second below which a disk, a link between nodes, is slow whatever the others are."""
_MOST_LINKS_NAMED = 4


@dataclass(frozen=True)
class Effort:
    """How many bytes each node writes, and each rank sends to its neighbours; how much of the arithmetic it does."""

    written_bytes: int
    sent_bytes: int
    arithmetic_share: float = 1.0

    @property
    def slow(self) -> dict[str, float]:
        """Seconds from which a measure is slow by itself, however slow the others are."""
        return {
            "write": max(self.written_bytes / _SLOW_DISK, _SLOW_WRITE_SECONDS),
            "latency": _SLOW_LATENCY_SECONDS,
            "exchange": max(self.sent_bytes / _SLOW_LINK, _SLOW_EXCHANGE_SECONDS),
        }


@dataclass(frozen=True)
class Reading:
    """What a rank finds at itself.

    ``problems``: what is bad there whatever the others have. ``seconds``: of each measure: "arithmetic" unless ranks
    share cores, "write" on one rank of each host, "latency" and "exchange" of the link to the next rank of the ring.
    ``clock``: in seconds since 1970, on all ranks at the same moment.
    """

    rank: int
    host: str
    software: Mapping[str, str]
    device: str
    problems: tuple[str, ...]
    clock: float
    seconds: Mapping[str, float]


class Finding(NamedTuple):
    """Something that is bad: in words, and the nodes to leave out for it. ``is_fatal``: no run may start so."""

    text: str
    hosts: tuple[str, ...]
    is_fatal: bool = False


class Link(NamedTuple):
    """Two ranks that follow each other in the ring; the left one has measured it."""

    left: Reading
    right: Reading

    @property
    def hosts(self) -> tuple[str, ...]:
        """Of the two ends, sorted; one where both are on it."""
        return tuple(sorted({self.left.host, self.right.host}))

    @property
    def is_far(self) -> bool:
        return self.left.host != self.right.host


def diagnose(readings: Sequence[Reading], effort: Effort) -> list[Finding]:
    return [*_different(readings), *_problems(readings), *_wrong_clocks(readings), *_slow(readings, effort)]


def _is_slow(seconds: float, usual: float, slow: float, only_beside_others: bool = False) -> bool:
    """Whether it is slow beside the ``usual``, or by itself (``slow``) unless only the comparison counts."""
    return (seconds > slow and not only_beside_others) or (seconds > _SLOW * usual and seconds > _FLOOR * slow)


def _different(readings: Sequence[Reading]) -> Iterator[Finding]:
    for what in [*dict.fromkeys(name for reading in readings for name in reading.software), "device"]:
        values = [_value(reading, what) for reading in readings]
        usual, num_usual = Counter(values).most_common(1)[0]
        others = [reading for reading, value in zip(readings, values, strict=True) if value != usual]
        if others:
            whose = "most ranks have" if 2 * num_usual > len(readings) else "others have"
            here = ", ".join(sorted(set(values) - {usual}))
            yield Finding(f"{_names(others)}: {here}, where {whose} {usual}", _hosts(others), what != "device")


def _value(reading: Reading, what: str) -> str:
    return reading.device if what == "device" else f"{what} {reading.software.get(what, 'is missing')}"


def _problems(readings: Sequence[Reading]) -> Iterator[Finding]:
    where = defaultdict(list)
    for reading in readings:
        for problem in reading.problems:
            where[problem].append(reading)
    for problem, those in where.items():
        yield Finding(f"{_names(those)}: {problem}", _hosts(those))


def _wrong_clocks(readings: Sequence[Reading]) -> Iterator[Finding]:
    usual = statistics.median_low(reading.clock for reading in readings)
    for host in dict.fromkeys(reading.host for reading in readings):
        ahead = next(reading.clock for reading in readings if reading.host == host) - usual
        if abs(ahead) > _CLOCK_SECONDS:
            text = f"the clock of {host} is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the others"
            yield Finding(text, (host,))


def _slow(readings: Sequence[Reading], effort: Effort) -> Iterator[Finding]:
    usual = _median(readings, "arithmetic")
    those = [reading for reading in readings if reading.seconds.get("arithmetic", 0.0) > _SLOW_RANK * usual]
    for reading in those:
        took = f"{reading.seconds['arithmetic']:.2g} s for the arithmetic that takes {usual:.2g} s on the median rank"
        yield Finding(f"{_names([reading])} computes slowly: {took}", (reading.host,))
    usual = _median(readings, "write")
    for reading in readings:
        seconds = reading.seconds.get("write", 0.0)
        if _is_slow(seconds, usual, effort.slow["write"]):
            size = format_bytes(effort.written_bytes)
            took = f"{seconds:.2g} s for {size} that take {usual:.2g} s on the median node"
            yield Finding(f"{reading.host} writes slowly into the run folder: {took}", (reading.host,))
    yield from _slow_links(readings, effort)


def _slow_links(readings: Sequence[Reading], effort: Effort) -> Iterator[Finding]:
    """A node is named whose links to several others are all slow, else the two ends of each link."""
    nexts = [*readings[1:], *readings[:1]]
    links = [Link(left, right) for left, right in zip(readings, nexts, strict=True) if "latency" in left.seconds]
    for is_far in (True, False):
        alike = [link for link in links if link.is_far is is_far]
        usual = {name: _median([link.left for link in alike], name) for name in ("exchange", "latency")}
        why = {link.left.rank: text for link in alike if (text := _why_slow(link, usual, effort))}
        slow = [link for link in alike if link.left.rank in why]
        nodes = _slow_nodes(alike, set(why)) if is_far else {}
        for node, rank in nodes.items():
            yield Finding(f"the network of {node} is slow: {why[rank]}", (node,))
        rest = list({link.hosts: link for link in slow if not nodes.keys() & set(link.hosts)}.values())
        for link in rest[:_MOST_LINKS_NAMED]:
            yield Finding(f"the link between {_names(link)} is slow: {why[link.left.rank]}", link.hosts[-1:])
        if len(rest) > _MOST_LINKS_NAMED:
            yield Finding(f"{len(rest)} of {len(alike)} links are slow in all", ())


def _why_slow(link: Link, usual: Mapping[str, float], effort: Effort) -> str:
    """How much it differs from the ``usual`` one of its kind; empty where it does not."""
    for name in usual:
        seconds = link.left.seconds[name]
        if _is_slow(seconds, usual[name], effort.slow[name], only_beside_others=not link.is_far):
            what = format_bytes(effort.sent_bytes) if name == "exchange" else "a few bytes"
            return f"{seconds * 1e3:.3g} ms for {what}, {usual[name] * 1e3:.3g} ms on the median link"
    return ""


def _slow_nodes(links: Sequence[Link], slow: Set[int]) -> dict[str, int]:
    """Nodes whose links to several others are all slow, with one such; none where that is no exception."""
    of_host: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        for host in link.hosts:
            of_host[host].append(link)
    found = {
        host: own[0].left.rank
        for host, own in of_host.items()
        if len({link.hosts for link in own}) > 1 and all(link.left.rank in slow for link in own)
    }
    return found if 2 * len(found) < len(of_host) else {}


def _median(readings: Sequence[Reading], name: str) -> float:
    """Of those that have measured it; of two in the middle the lower."""
    found = [reading.seconds[name] for reading in readings if name in reading.seconds]
    return statistics.median_low(found) if found else math.inf


def _names(readings: Sequence[Reading]) -> str:
    return name_ranks((reading.rank, reading.host) for reading in readings)


def _hosts(readings: Sequence[Reading]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reading.host for reading in readings))

"""Where the time and the memory of steps went, by the trace that torch.profiler has written of them.

The time of a device is cut into pieces without overlap, each with the place in the step that it belongs to, so that
their sum is the time of the steps:

- On a GPU the device is the GPU. A kernel belongs to the place at which the host launched it; where the GPU has no
  kernel to run, it waits for the place of the next one.
- On a CPU the device is the thread that trains. An operation belongs to the place at which it runs; the time between
  operations is the interpreter's, and so is that of the device's waiting.
- While nothing else runs and a message between ranks is on its way, it is the message that is waited for.

A place is named by the innermost range around it (``megatrain.ranges``). A node of the backward pass belongs
to the place of the operation that made it in the forward pass: both have one sequence number.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatrain.ranges import BACKWARD, DATA, EXCHANGE, FORWARD, MESSAGES, OPTIMIZER, STEP

GRADIENTS = "gradients"
"""The part of what adds up gradients of weights, with the hooks of the sharding."""
SHARDING = "sharding"
"""The part of what FSDP2 does around the layers: it gathers weights and reduces gradients."""
OTHER = "other"

_OUTSIDE = (DATA, OPTIMIZER, EXCHANGE, MESSAGES)  # ranges that are parts themselves, outside of the passes
_NODE = "autograd::engine::evaluate_function: "
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_OF_MESSAGES = re.compile(r"c10d::|record_param_comms|nccl|rccl|gloo", re.IGNORECASE)
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_MICROSECOND = 1e-6
_CPU_MEMORY, _GPU_MEMORY = 0, 1  # device types in the trace


class Place(NamedTuple):
    """``part``: a module's name without the number of its layer, or a part outside of the passes. ``phase``: FORWARD,
    BACKWARD, or neither."""

    part: str
    phase: str


class Piece(NamedTuple):
    """Of the device's time, in microseconds. ``is_busy``: whether it computed."""

    start: float
    end: float
    place: Place
    is_busy: bool


@dataclass(frozen=True)
class Part:
    """Seconds of a step that a part of it took: operations by phase (``outside``: in neither pass), and ``idle``, in
    which the device had nothing to do before the part's next operation.

    ``kept_bytes``: what the forward passes of a step left allocated, for the backward passes. ``peak_bytes``: the most
    that was allocated while it was at work; on a CPU beyond what was there before.
    """

    name: str
    forward: float = 0.0
    backward: float = 0.0
    outside: float = 0.0
    idle: float = 0.0
    kept_bytes: float = 0.0
    peak_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.outside + self.idle


@dataclass(frozen=True)
class Kernel:
    """A kernel, on a CPU an operation without those that it calls: calls and seconds of a step."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """Of a step, in seconds. ``messages``: between ranks, waited for; ``hidden``: those that were on their way while
    the device computed, which are no part of the step. The step is the sum of the parts and the messages."""

    step: float
    messages: float
    hidden: float
    parts: Sequence[Part]
    kernels: Sequence[Kernel]

    @property
    def idle(self) -> float:
        """Seconds in which the device computed nothing and waited for no message."""
        return sum(part.idle for part in self.parts)


def break_down(trace: Mapping[str, Any], modules: Iterable[str]) -> Breakdown:
    """Break down the steps of a trace. ``modules``: the ranges that are modules' forward passes."""
    events = trace["traceEvents"]
    steps = [each for each in events if each.get("name") == STEP and each.get("cat") == "user_annotation"]
    begin, end = min(each["ts"] for each in steps), max(each["ts"] + each["dur"] for each in steps)
    host = _Host(events, (steps[0]["pid"], steps[0]["tid"]), frozenset(modules))
    device = _Gpu(events, host, begin, end) if _has_kernels(events) else _Cpu(host, begin, end)
    unit = _MICROSECOND / len(steps)
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    waited = 0.0
    for piece in device.pieces:
        of_part = parts[piece.place.part]
        if piece.is_busy:
            of_part[piece.place.phase or "outside"] += unit * (piece.end - piece.start)
            continue
        for start, stop, is_message in device.messages.cut(piece.start, piece.end):
            if is_message:
                waited += unit * (stop - start)
            else:
                of_part["idle"] += unit * (stop - start)
    for name, figures in _memory(events, host, begin, end, len(steps)).items():
        parts[name] |= figures
    sent = unit * sum(stop - start for start, stop, is_message in device.messages.cut(begin, end) if is_message)
    kernels = [Kernel(name, calls / len(steps), unit * spent) for name, (calls, spent) in device.kernels.items()]
    return Breakdown(
        step=unit * (end - begin),
        messages=waited,
        hidden=max(sent - waited, 0.0),
        parts=sorted((Part(name, **figures) for name, figures in parts.items()), key=lambda part: -part.seconds),
        kernels=sorted(kernels, key=lambda kernel: -kernel.seconds),
    )


class _Intervals:
    """Intervals of time, those that overlap made one."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted(intervals):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def cut(self, start: float, end: float) -> Iterator[tuple[float, float, bool]]:
        """The time from ``start`` to ``end`` in pieces, each with whether it is within an interval."""
        index = bisect_right(self._ends, start)
        while start < end:
            is_last = index == len(self._starts) or self._starts[index] >= end
            border = end if is_last else max(self._starts[index], start)
            if start < border:
                yield start, border, False
            if is_last:
                return
            stop = min(self._ends[index], end)
            yield border, stop, True
            start, index = stop, index + 1


class _Range:
    """A range or operation of the host, and the one that it is within."""

    __slots__ = ("end", "has_children", "is_operation", "name", "node", "parent", "start")

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.name: str = event["name"]
        self.start: float = event["ts"]
        self.end: float = event["ts"] + event["dur"]
        self.is_operation = event["cat"] == "cpu_op" and not self.name.startswith(_NODE)
        arguments = event.get("args", {})
        # Of a node of the backward pass; some have it in the operation within alone.
        self.node: int | None = arguments.get("Sequence number") if arguments.get("Fwd thread id") else None
        self.parent: _Range | None = None
        self.has_children = False


class _Host:
    """The host's threads: at which place each was at any time. ``main``: process and thread that train."""

    def __init__(self, events: Iterable[Mapping[str, Any]], main: tuple[int, int], modules: frozenset[str]) -> None:
        self._modules, self._places = modules, dict[int, Place]()
        self.main = main
        threads: dict[tuple[int, int], list[_Range]] = defaultdict(list)
        self.messages: list[tuple[float, float]] = []
        self._makers: dict[int, _Range] = {}  # by sequence number, the operation that made a node
        for event in events:
            if event.get("ph") != "X" or event.get("cat") not in ("cpu_op", "user_annotation"):
                continue
            made = _Range(event)
            if made.name.startswith(("gloo:", "nccl:")):  # from its start to its end, on no thread
                self.messages.append((made.start, made.end))
                continue
            threads[event["pid"], event["tid"]].append(made)
            arguments = event.get("args", {})
            if (event["pid"], event["tid"]) == main and not arguments.get("Fwd thread id"):
                number = arguments.get("Sequence number")
                # Several ask for the number before a node takes it; the last of them makes the node.
                if number is not None and (number not in self._makers or self._makers[number].start <= made.start):
                    self._makers[number] = made
        self._segments = {thread: _segments(ranges) for thread, ranges in threads.items()}

    def segments(self) -> Iterator[tuple[float, float, _Range | None]]:
        """Of the main thread: from when to when which range was the innermost."""
        starts, owners = self._segments[self.main]
        yield from zip(starts, [*starts[1:], float("inf")], owners, strict=True)

    def at(self, thread: tuple[int, int], time: float) -> Place:
        """The place at which a thread was at a time."""
        starts, owners = self._segments.get(thread, ((), ()))
        index = bisect_right(starts, time) - 1
        return self.place(owners[index] if index >= 0 else None)

    def place(self, within: _Range | None) -> Place:
        """The place of a range."""
        if within is None:
            return Place(OTHER, "")
        if id(within) not in self._places:
            self._places[id(within)] = self._find(within)
        return self._places[id(within)]

    def _find(self, within: _Range) -> Place:
        name, around = within.name, self.place(within.parent)
        if name in _OUTSIDE:
            return Place(name, "")
        if name.startswith(_NODE):
            maker = None if within.node is None else self._makers.get(within.node)
            return Place(GRADIENTS, BACKWARD) if maker is None else self.place(maker)._replace(phase=BACKWARD)
        if name.startswith("FSDP::"):
            return Place(SHARDING, around.phase)
        if name in self._modules:
            return Place(_NUMBER.sub("", name), BACKWARD if around.phase == BACKWARD else FORWARD)
        if name in (FORWARD, BACKWARD):
            return Place(OTHER, name)
        return around


def _segments(ranges: list[_Range]) -> tuple[list[float], list[_Range | None]]:
    """When the innermost of nested ranges changes, and to which; sets their parents."""
    starts: list[float] = []
    owners: list[_Range | None] = []
    stack: list[_Range] = []

    def leave_until(time: float) -> None:
        while stack and stack[-1].end <= time:
            left = stack.pop()
            starts.append(left.end)
            owners.append(stack[-1] if stack else None)

    for each in sorted(ranges, key=lambda x: (x.start, -x.end)):
        leave_until(each.start)
        if stack:
            each.parent, stack[-1].has_children = stack[-1], True
            if stack[-1].name.startswith(_NODE) and stack[-1].node is None:
                stack[-1].node = each.node
            each.end = min(each.end, stack[-1].end)
        starts.append(each.start)
        owners.append(each)
        stack.append(each)
    leave_until(float("inf"))
    return starts, owners


class _Cpu:
    """The thread that trains, taken for the device: its pieces without overlap or gap, what was on its way between
    ranks, and by name how often an operation was called and its microseconds."""

    def __init__(self, host: _Host, begin: float, end: float) -> None:
        self.pieces: list[Piece] = []
        self.kernels: dict[str, tuple[int, float]] = {}
        waited: list[tuple[float, float]] = []
        in_flight = _Intervals(host.messages)
        for start, stop, owner in host.segments():
            first, last = max(start, begin), min(stop, end)
            if first >= last:
                continue
            place = host.place(owner)
            if place.part == MESSAGES or (owner is not None and _OF_MESSAGES.match(owner.name)):
                waited.append((first, last))
                self.pieces.append(Piece(first, last, place, is_busy=False))
            elif owner is None or not owner.is_operation:
                self.pieces.append(Piece(first, last, place, is_busy=False))
            else:
                # One that calls others, such as a function of ours with a backward pass, may wait for a message.
                cut = in_flight.cut(first, last) if owner.has_children else [(first, last, False)]
                self.pieces += [Piece(one, other, place, not is_message) for one, other, is_message in cut]
                calls, spent = self.kernels.get(owner.name, (0, 0.0))
                self.kernels[owner.name] = calls + (owner.start == start), spent + last - first
        self.messages = _Intervals([*waited, *host.messages])


class _Gpu:
    """The same of a GPU. Where two of its streams compute at once, the kernel that began first counts."""

    def __init__(self, events: Iterable[Mapping[str, Any]], host: _Host, begin: float, end: float) -> None:
        self.pieces: list[Piece] = []
        self.kernels: dict[str, tuple[int, float]] = {}
        launched = {
            each["args"]["correlation"]: host.at((each["pid"], each["tid"]), each["ts"])
            for each in events
            if each.get("cat") in _LAUNCHES and "correlation" in each.get("args", {})
        }
        messages: list[tuple[float, float]] = []
        cursor = begin
        kernels = [each for each in events if each.get("cat") in _KERNELS and begin <= each["ts"] < end]
        for kernel in sorted(kernels, key=lambda each: each["ts"]):
            name, start, stop = kernel["name"], kernel["ts"], min(kernel["ts"] + kernel["dur"], end)
            calls, spent = self.kernels.get(name, (0, 0.0))
            self.kernels[name] = calls + 1, spent + stop - start
            if _OF_MESSAGES.match(name):
                messages.append((start, stop))
                continue
            place = launched.get(kernel["args"].get("correlation"), Place(OTHER, ""))
            if start > cursor:
                self.pieces.append(Piece(cursor, start, place, is_busy=False))
            if stop > cursor:
                self.pieces.append(Piece(max(start, cursor), stop, place, is_busy=True))
                cursor = stop
        if cursor < end:
            self.pieces.append(Piece(cursor, end, Place(OTHER, ""), is_busy=False))
        self.messages = _Intervals(messages)


def _has_kernels(events: Iterable[Mapping[str, Any]]) -> bool:
    return any(each.get("cat") == "kernel" for each in events)


def _memory(
    events: Iterable[Mapping[str, Any]], host: _Host, begin: float, end: float, num_steps: int
) -> dict[str, dict[str, float]]:
    """Of each part ``kept_bytes`` and ``peak_bytes``."""
    found = [each["args"] | {key: each[key] for key in ("ts", "pid", "tid")} for each in events if _is_memory(each)]
    kind = max((each["Device Type"] for each in found), default=_CPU_MEMORY)
    figures: dict[str, dict[str, float]] = defaultdict(lambda: {"kept_bytes": 0.0, "peak_bytes": 0.0})
    allocated = 0.0
    for each in sorted(found, key=lambda event: event["ts"]):
        if each["Device Type"] != kind:
            continue
        allocated = each["Total Allocated"] if kind == _GPU_MEMORY else allocated + each["Bytes"]
        if not begin <= each["ts"] <= end:
            continue
        place = host.at((each["pid"], each["tid"]), each["ts"])
        of_part = figures[place.part]
        of_part["peak_bytes"] = max(of_part["peak_bytes"], allocated)
        if place.phase == FORWARD:
            of_part["kept_bytes"] += each["Bytes"] / num_steps
    return figures


def _is_memory(event: Mapping[str, Any]) -> bool:
    return event.get("name") == "[memory]" and event["args"]["Device Type"] in (_CPU_MEMORY, _GPU_MEMORY)

"""Where the time of traced steps went, from traces written by hand as Kineto writes them, in microseconds."""

from __future__ import annotations

from typing import Any

import pytest

from megatrain.observe.trace import Breakdown, Part, break_down

HOST, BACKWARD_THREAD, STREAM, OTHER_STREAM = 1, 2, 7, 20
NODE = "autograd::engine::evaluate_function: MmBackward0"


def event(category: str, name: str, begin: float, end: float, tid: int = HOST, **args: Any) -> dict[str, Any]:
    given = {key.replace("_", " ").capitalize(): value for key, value in args.items()}
    if "Correlation" in given:
        given["correlation"] = given.pop("Correlation")
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 1,
        "tid": tid,
        "ts": begin,
        "dur": end - begin,
        "args": given,
    }


def ranged(name: str, begin: float, end: float) -> dict[str, Any]:
    return event("user_annotation", name, begin, end)


def launched(
    number: int, name: str, launch: float, begin: float, end: float, tid: int = HOST, stream: int = STREAM
) -> list[dict[str, Any]]:
    return [
        event("cuda_runtime", "cudaLaunchKernel", launch, launch + 1, tid, correlation=number),
        event("kernel", name, begin, end, stream, correlation=number),
    ]


def memory(at: float, num_bytes: int, total: int, device: int) -> dict[str, Any]:
    args = {"Bytes": num_bytes, "Total Allocated": total, "Device Type": device}
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": HOST, "ts": at, "args": args}


def part(found: Breakdown, name: str) -> Part:
    return next(each for each in found.parts if each.name == name)


MODULES = ["layers.0.mlp", "layers.1.mlp"]
RANGES = [
    ranged("step", 0, 1000),
    ranged("data", 0, 100),
    ranged("forward", 100, 200),
    ranged("layers.0.mlp", 110, 150),
    ranged("layers.1.mlp", 150, 190),
    ranged("optimizer", 300, 320),
]


def test_kernels_belong_where_they_were_launched() -> None:
    events = [
        *RANGES,
        event("cpu_op", "aten::mm", 112, 118, sequence_number=5, fwd_thread_id=0),
        event("cpu_op", NODE, 210, 230, BACKWARD_THREAD, sequence_number=5, fwd_thread_id=1),
        *launched(1, "gemm", 113, 200, 300),
        *launched(2, "gemm", 155, 300, 400),
        *launched(3, "gemm", 215, 450, 650, tid=BACKWARD_THREAD),
        *launched(4, "ncclDevKernel_AllReduce", 240, 600, 800, stream=OTHER_STREAM),
        *launched(5, "adamw", 305, 800, 900),
        memory(114, 1000, 5000, 1),
        memory(216, -1000, 4000, 1),
        memory(115, 64, 64, 0),
    ]
    found = break_down({"traceEvents": events}, MODULES)
    mlp = part(found, "layers.mlp")
    assert (mlp.forward, mlp.backward) == pytest.approx((200e-6, 200e-6))
    assert mlp.idle == pytest.approx(250e-6)  # before the first kernel, and before that of the backward pass
    assert (mlp.kept_bytes, mlp.peak_bytes) == (1000, 5000)
    assert part(found, "optimizer").outside == pytest.approx(100e-6)
    assert (found.messages, found.hidden) == pytest.approx((150e-6, 50e-6))
    assert [kernel.name for kernel in found.kernels] == ["gemm", "ncclDevKernel_AllReduce", "adamw"]
    assert found.step == pytest.approx(1000e-6)
    assert sum(each.seconds for each in found.parts) + found.messages == pytest.approx(found.step)


def test_on_a_cpu_operations_are_its_time() -> None:
    events = [
        *RANGES,
        ranged("backward", 200, 300),
        event("cpu_op", "aten::linear", 112, 140, sequence_number=5, fwd_thread_id=0),
        event("cpu_op", "aten::mm", 114, 138, sequence_number=5, fwd_thread_id=0),
        event("cpu_op", NODE, 210, 240, sequence_number=5, fwd_thread_id=1),
        event("cpu_op", "aten::mm", 215, 235),
        event("cpu_op", "_Sum", 160, 188),  # it waits for its message
        event("cpu_op", "c10d::allreduce_", 162, 165),
        event("user_annotation", "gloo:all_reduce", 164, 187, tid=HOST),
        event("cpu_op", "aten::_fused_adamw_", 302, 318),
        memory(115, 64, 64, 0),
    ]
    found = break_down({"traceEvents": events}, MODULES)
    mlp = part(found, "layers.mlp")
    assert (mlp.forward, mlp.backward) == pytest.approx((31e-6, 20e-6))
    assert found.messages == pytest.approx(25e-6)
    assert part(found, "data").idle == pytest.approx(100e-6)
    assert part(found, "optimizer").outside == pytest.approx(16e-6)
    assert mlp.kept_bytes == 64
    kernels = {kernel.name: (kernel.calls, kernel.seconds) for kernel in found.kernels}
    assert kernels["aten::mm"] == pytest.approx((2, 44e-6))
    assert kernels["aten::linear"] == pytest.approx((1, 4e-6))
    assert sum(each.seconds for each in found.parts) + found.messages == pytest.approx(1000e-6)

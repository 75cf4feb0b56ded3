"""What errors mean, by their texts as users of torch, NCCL and gloo have reported them, or as torch says them here."""

from __future__ import annotations

import pytest
import torch

from megatrain.distributed.causes import Cause, explain, find_cause, is_lost_peer, last_words
from megatrain.distributed.failures import LostPeer
from megatrain.errors import EXIT_BUG, EXIT_RANK, EXIT_USAGE

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2588, {}, NCCL version 2.27.7\n{}: {}\n"
)
NCCL += "Last error:\n{}"
REMOTE = ("remote process exited or there was a network error", "ncclRemoteError", "A call failed possibly due to ...")
USAGE = (
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage",
    "This usually reflects invalid ...",
)
INTERNAL = ("internal error - please report this issue", "ncclInternalError", "Internal check failed.")
SYSTEM = ("unhandled system error (run with NCCL_DEBUG=INFO ...)", "ncclSystemError", "System call (e.g. socket, ...)")
CUDA = (
    "unhandled cuda error (run with NCCL_DEBUG=INFO ...)",
    "ncclUnhandledCudaError",
    "Call to CUDA function failed.",
)
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] {}"
ENFORCE = "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. {}"
ALLOCATE = (
    "CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 11.06 MiB is"
)

REPORTED = [
    (NCCL.format(*REMOTE, "socketProgressOpt: Call to recv from 10.1.2.3<33759> failed : Connection reset by peer"), 0),
    (NCCL.format(*REMOTE, "NET/IB : Got completion from peer 10.0.35.1<49189> with error 12, opcode 0"), 0),
    (NCCL.format(*INTERNAL, "Socket recv failed while polling for opId=0x7f4774cc9620"), 0),
    ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE) ran for ...", 0),
    (GLOO.format("Connection closed by peer [10.1.2.3]:26413"), 0),
    (GLOO.format("Read timeout [10.1.2.3]:26413"), 0),
    ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", 0),
    ("Timed out waiting 60000ms for recv operation to complete", 0),
    (NCCL.format(*USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10"), Cause.DUPLICATE_GPU),
    (
        NCCL.format(*USAGE, "Mismatched NCCL version detected : rank 8 version 22907 rank 0 version 22304"),
        Cause.VERSION,
    ),
    (NCCL.format(*CUDA, "Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'"), Cause.VERSION),
    ("CUDA error: no kernel image is available for execution on the device", Cause.VERSION),
    (NCCL.format(*INTERNAL, "Bootstrap : no socket interface found"), Cause.INTERFACE),
    (
        NCCL.format(
            *INTERNAL, "ncclSocketInit: connecting to address  with family 59936 is neither AF_INET(2) nor AF_INET6(10)"
        ),
        Cause.INTERFACE,
    ),
    (ENFORCE.format("Unable to find address for: ^lo"), Cause.INTERFACE),
    (
        "Gloo connectFullMesh failed with "
        + GLOO.format("timed out connecting: SO_ERROR: Connection refused, remote=[127.0.0.1]:3"),
        Cause.UNREACHABLE,
    ),
    (
        NCCL.format(*SYSTEM, "socketStartConnect: Connect to 172.17.0.1<42611> failed : Connection refused"),
        Cause.UNREACHABLE,
    ),
    (
        NCCL.format(
            *SYSTEM,
            "Error while creating shared memory segment /dev/shm/nccl-WU88OE (size 9637888), error: No "
            "space left on device (28)",
        ),
        Cause.SHARED_MEMORY,
    ),
    (NCCL.format(*SYSTEM, "Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory"), Cause.LIMIT),
    (NCCL.format(*CUDA, "Cuda failure 2 'out of memory'"), Cause.MEMORY),
    (NCCL.format(*CUDA, "Failed to CUDA calloc 6291456 bytes"), Cause.MEMORY),
    (ALLOCATE, Cause.MEMORY),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Cause.MEMORY),
    ("CUDA error: uncorrectable ECC error encountered", Cause.DEVICE),
    ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", Cause.DEVICE),
    (NCCL.format(*CUDA, "Cuda failure 999 'unknown error'"), Cause.DEVICE),
    ("CUDA error: all CUDA-capable devices are busy or unavailable", Cause.BUSY),
    (NCCL.format(*SYSTEM, "nvmlInit() failed: Driver/library version mismatch"), Cause.VERSION),
    ("unable to mmap 4096 bytes from file </x>: Cannot allocate memory (12)", Cause.MEMORY),
    ("unable to write to file </torch_12_34>: No space left on device (28)", Cause.SHARED_MEMORY),
    (NCCL.format(*INTERNAL, "Message truncated : received 256 bytes instead of 4"), Cause.WRONG_USE),
    (
        "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8",
        Cause.WRONG_USE,
    ),
    (NCCL.format(*SYSTEM, "something that nobody has seen"), Cause.UNKNOWN),
]


@pytest.mark.parametrize(("text", "cause"), REPORTED, ids=[text.splitlines()[-1][:40] for text, _ in REPORTED])
def test_causes_are_told_apart(text: str, cause: Cause | int) -> None:
    """And the library's own last words are shown."""
    error, expected = RuntimeError(text), cause or Cause.LOST_PEER
    assert find_cause(error) is expected
    assert is_lost_peer(error) is (expected in (Cause.LOST_PEER, Cause.UNREACHABLE))
    told = explain(error, "Rank 3 on node7")
    assert told is not None
    assert text.splitlines()[-1][:100].rstrip(".") in told[1]
    assert ("Another rank or its node died" in told[1]) is (expected is Cause.LOST_PEER)


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [(REPORTED[0][0], EXIT_RANK), (NCCL.format(*USAGE, "Duplicate GPU detected"), EXIT_USAGE), (ALLOCATE, EXIT_USAGE)],
)
def test_only_failures_worth_a_retry_are_requeued(text: str, exit_code: int) -> None:
    told = explain(RuntimeError(text), "Rank 0")
    assert told is not None
    assert told[0] == exit_code


def test_other_errors_are_bugs() -> None:
    assert find_cause(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)")) is None
    assert find_cause(RuntimeError("No backend type associated with device type cpu")) is None
    assert find_cause(ConnectionResetError("Connection reset by peer")) is None  # an object store's, perhaps
    wrong_use = explain(RuntimeError(NCCL.format(*USAGE, "Root 5 out of range")), "Rank 0")
    assert wrong_use is not None
    assert wrong_use[0] == EXIT_BUG


def test_this_torch_reports_memory_exhaustion_as_expected() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 47, dtype=torch.uint8)
    assert find_cause(raised.value) is Cause.MEMORY
    assert find_cause(MemoryError()) is Cause.MEMORY
    assert find_cause(LostPeer("rank 1 hears nothing from rank 2 (Timed out)")) is Cause.LOST_PEER


def test_the_last_words_are_short() -> None:
    assert last_words(RuntimeError(NCCL.format(*REMOTE, ""))).startswith("ncclRemoteError: A call failed")
    assert len(last_words(RuntimeError("NCCL " + 1000 * "x"))) == 300

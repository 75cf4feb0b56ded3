"""What an error of torch, NCCL or gloo means: each has texts of its own, and a dead peer is one cause of many.

The texts are the libraries' own; tests/unit/distributed/test_causes.py has some as they were reported.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from megatrain.distributed.failures import LostPeer
from megatrain.errors import EXIT_BUG, EXIT_RANK, EXIT_USAGE

_MOST_SHOWN = 300


class Cause(Enum):
    """What went wrong where ranks compute and speak with each other."""

    MEMORY = "out of memory"
    SHARED_MEMORY = "no shared memory"
    LIMIT = "a limit of the system"
    DUPLICATE_GPU = "two ranks on one GPU"
    VERSION = "versions that do not go together"
    INTERFACE = "no network interface"
    DEVICE = "the GPU failed"
    BUSY = "the GPU is taken"
    UNREACHABLE = "another rank is unreachable"
    LOST_PEER = "lost the others"
    NONDETERMINISTIC = "an operation is not deterministic"
    WRONG_USE = "the ranks disagree"
    UNKNOWN = "the ranks cannot communicate"


class _Meaning(NamedTuple):
    """How one cause is recognised, what it is worth, and what to do. ``exit_code`` 5: another start may go well."""

    cause: Cause
    pattern: re.Pattern[str]
    exit_code: int
    advice: str


def _means(cause: Cause, pattern: str, exit_code: int, advice: str) -> _Meaning:
    return _Meaning(cause, re.compile(pattern, re.IGNORECASE), exit_code, advice)


# The first whose pattern is found counts: what NCCL reports after it (a closed connection) is not the cause.
_MEANINGS = (
    _means(
        Cause.LIMIT,
        r"ibv_\w+ .*Cannot allocate memory|Too many open files|memlock",
        EXIT_USAGE,
        "A limit of the node is too low: `ulimit -l` (locked memory, for InfiniBand) should be unlimited, `ulimit -n` "
        "(open files) some ten thousand, for the ranks too, not only where you log in.",
    ),
    _means(
        Cause.SHARED_MEMORY,
        r"shared memory segment|/dev/shm|posix_fallocate|</torch_\w+>.*No space left",
        EXIT_USAGE,
        "/dev/shm of the node or container is full or too small: remove what an earlier job left there, or give the "
        "container more (--shm-size, --ipc=host).",
    ),
    _means(
        Cause.MEMORY,
        r"out of memory|(can't|cannot) allocate memory|Failed to CUDA calloc|STATUS_ALLOC_FAILED|std::bad_alloc",
        EXIT_USAGE,
        "",
    ),
    _means(
        Cause.NONDETERMINISTIC,
        r"does not have a deterministic implementation|this operation is not deterministic",
        EXIT_USAGE,
        "train.deterministic allows none such: do without what computes it, or set train.deterministic to false.",
    ),
    _means(
        Cause.DUPLICATE_GPU,
        r"Duplicate GPU detected",
        EXIT_USAGE,
        "Two ranks have one GPU. Start as many ranks on a node as it has GPUs, and let LOCAL_RANK say which is whose.",
    ),
    _means(
        Cause.VERSION,
        r"Mismatched NCCL version|driver version is insufficient|driver on your system is too old|"
        r"no kernel image is available|named symbol not found|unsupported toolchain|forward compatibility was|"
        r"Driver/library version mismatch",
        EXIT_USAGE,
        "NCCL, torch and the driver have to go together, and be the same on all nodes: `megatrain-launch doctor` "
        "compares them. Look for another NCCL in LD_LIBRARY_PATH.",
    ),
    _means(
        Cause.INTERFACE,
        r"no socket interface found|No usable listening interface|SOCKET_IFNAME interface found|"
        r"is neither AF_INET|Unable to find (address|interface) for|unable to resolve hostname",
        EXIT_USAGE,
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names no network of this node, or its own name has no address: `ip "
        "-brief address` lists the networks; take one that all nodes share. gloo takes one name, no ^ and no list.",
    ),
    _means(
        Cause.DEVICE,
        r"ECC error|GPU is lost|fallen off the bus|hardware stack error|unspecified launch failure|NVLink.*error|"
        r"system not yet initialized|Cuda failure 999|CUDA (error: )?unknown error",
        EXIT_RANK,
        "The GPU, or what it is plugged into, has failed: look at the node's kernel log (Xid), and leave the node out.",
    ),
    _means(
        Cause.BUSY,
        r"devices are busy or unavailable",
        EXIT_RANK,
        "Another process has this GPU to itself: `nvidia-smi` on that node shows which. An earlier job left it, "
        "or two ranks take one GPU whose compute mode is exclusive.",
    ),
    _means(
        Cause.UNREACHABLE,
        r"connectFullMesh failed|timed out connecting|No route to host|Network is unreachable|"
        r"connect to .* failed|Connection refused",
        EXIT_RANK,
        "Another rank does not answer where it said it would: it has died (its log tells), or its address is not on a "
        "network that all nodes share. NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name one that is.",
    ),
    _means(
        Cause.LOST_PEER,
        r"connection (was likely )?closed|Connection reset by peer|Broken pipe|ncclRemoteError|remote process exited|"
        r"Timed out waiting|wait timeout after|collective operation timeout|(Read|Write|Application) timeout|"
        r"Got completion from peer|Socket recv failed|communicator was aborted",
        EXIT_RANK,
        "Another rank or its node died, or does not answer. Start the run again: it goes on from the newest "
        "checkpoint.",
    ),
    _means(
        Cause.WRONG_USE,
        r"ncclInvalid(Usage|Argument)|enforce fail|message truncated|mismatch(ed| between) collective",
        EXIT_BUG,
        "Ranks asked NCCL or gloo for different things. Are NCCL_* variables and versions the same on all ranks? Else "
        "it is a bug of megatrain: please report it.",
    ),
    _means(
        Cause.UNKNOWN,
        r"\bNCCL\b|\bgloo\b",
        EXIT_RANK,
        "NCCL_DEBUG=WARN tells more at the next start.",
    ),
)


def find_cause(error: BaseException) -> Cause | None:
    """What the error is a case of; None where it is none of these: a bug."""
    meaning = _meaning(error)
    return meaning.cause if meaning else None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a peer died or no longer answers: then others may know which one it was."""
    return find_cause(error) in (Cause.LOST_PEER, Cause.UNREACHABLE)


def explain(error: BaseException, who: str) -> tuple[int, str] | None:
    """The exit code and one paragraph, with the library's own last words; None where the error is a bug.

    ``who``: the rank, in words.
    """
    if (meaning := _meaning(error)) is None:
        return None
    return meaning.exit_code, f"{who}: {meaning.cause.value} ({last_words(error)}). {meaning.advice}".rstrip()


def last_words(error: BaseException) -> str:
    """What the library said at last, on one line: NCCL's last error, where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    details = lines[lines.index("Last error:") + 1 :] if "Last error:" in lines else []
    results = [line for line in lines if line.startswith("nccl")]
    return (details or results or lines)[0][:_MOST_SHOWN].rstrip(".")


def _meaning(error: BaseException) -> _Meaning | None:
    if isinstance(error, LostPeer):
        return next(meaning for meaning in _MEANINGS if meaning.cause is Cause.LOST_PEER)
    if isinstance(error, MemoryError):
        return next(meaning for meaning in _MEANINGS if meaning.cause is Cause.MEMORY)
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    return next((meaning for meaning in _MEANINGS if meaning.pattern.search(text)), None)

"""`train.deterministic`: the same numbers to the last bit, whenever the same layout runs on devices of the same kind.

On a GPU the order in which numbers are added is often left to chance: attention adds gradients with atomics, cuBLAS
takes another workspace for each stream, the compiler times kernels and takes the quickest, NCCL adds in switches.
"""

from __future__ import annotations

import os

import torch

from megatrain.errors import ConfigError

_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_ALGORITHM = "NCCL_ALGO"
_OFF = "or set train.deterministic to false"


def set_deterministic(wanted: bool) -> None:
    """Let this process compute deterministically or not; an operation that cannot raises RuntimeError where it is used.

    Before CUDA is started: some of it is read from the environment then. Raises ConfigError where the environment asks
    for the contrary, or CUDA has been started without.
    """
    if wanted:
        _set_environment()
    if wanted == torch.are_deterministic_algorithms_enabled():
        return  # the call loads the settings of torch's compiler, for some tenths of a second
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # Else memory that is still to be written is filled: a pass over each activation, for what nothing reads.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]


def _set_environment() -> None:
    workspace, algorithm = os.environ.get(_WORKSPACE), os.environ.get(_ALGORITHM, "")
    if workspace is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"train.deterministic is true, but this process has started CUDA already, without {_WORKSPACE}: export it "
            f"as {_WORKSPACES[0]} before, {_OFF}."
        )
    if workspace is not None and workspace not in _WORKSPACES:
        raise ConfigError(
            f"train.deterministic is true, but {_WORKSPACE} is {workspace}, under which cuBLAS is not deterministic: "
            f"unset it, {_OFF}."
        )
    if "NVLS" in algorithm.upper() and not algorithm.startswith("^"):
        raise ConfigError(
            f"train.deterministic is true, but {_ALGORITHM} is {algorithm}: NVLS adds in the switches, in any order. "
            f"Unset it, {_OFF}."
        )
    os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    os.environ.setdefault(_ALGORITHM, "Ring")

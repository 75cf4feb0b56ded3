"""What would make a process wait for its device, or copy memory that is not pinned: noticed on a CPU, by its name."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = {
    "_local_scalar_dense": "its value is read",
    "equal": "its value is read",
    "nonzero": "the number of its results is read",
    "masked_select": "the number of its results is read",
    "_unique2": "the number of its results is read",
    "repeat_interleave": "the number of its results is read",
    "lift_fresh": "made of Python's numbers, it is copied from memory that is not pinned",
}
_BY_MASK = ("index", "index_put", "index_put_", "_index_put_impl_")
_METHODS = ("tolist", "numpy", "cpu", "item")
_OWN = ("/megatrain/", "/deepspeed/", "/torch/distributed/", "/torch/optim/", "/torch/nn/utils/")


@contextlib.contextmanager
def waits_counted(found: Counter[str], messages: Counter[str]) -> Iterator[None]:
    """Count in ``found``, by operation and by the function that asks for it, what this thread's code does here; in
    ``messages`` its collectives, by name."""
    with _Methods(found), _Operators(found, messages):
        yield


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str], messages: Counter[str]) -> None:
        super().__init__()
        self._found, self._messages = found, messages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        self._messages[name] += namespace == "c10d"
        by_mask = name in _BY_MASK and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if by_mask or (name in _OPERATORS and (name != "repeat_interleave" or kwargs is None)):
            self._found[f"{name} in {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            self._found[f"{name} in {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and not any(part in frame.f_code.co_filename for part in _OWN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"

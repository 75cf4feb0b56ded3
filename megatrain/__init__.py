"""Distributed pretraining of decoder language models that proves itself before you spend the GPU hours."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatrain.version import __version__

if TYPE_CHECKING:
    from megatrain.api import Callback, Model, Run, load, open_run, train


__all__ = ["Callback", "Model", "Run", "__version__", "load", "open_run", "train"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first used: the commands answer without torch."""
    if name in __all__:
        return getattr(import_module("megatrain.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The loop, and the place where all parts meet. `megatrain.train(...)`, of the Python API, is this package called."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Python binds the name `megatrain.train` to this package as soon as any of its modules is imported."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from importlib import import_module

        return import_module("megatrain.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

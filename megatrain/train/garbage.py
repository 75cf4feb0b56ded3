"""When Python looks for garbage: between steps, at the same ones on all ranks, which else wait for each other's."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

STEPS_BETWEEN = 100


@contextlib.contextmanager
def collected_on_request() -> Iterator[None]:
    """In this context only ``gc.collect`` collects, and what is there by now is no longer looked through."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

"""Garbage is collected between steps alone, when the trainer asks."""

from __future__ import annotations

import gc
import weakref

from megatrain.train.garbage import collected_on_request


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_when_asked_alone() -> None:
    before = gc.get_freeze_count()
    with collected_on_request():
        old = gc.get_freeze_count()
        died = weakref.ref(Cycle())
        for _ in range(5000):  # more than the collector's thresholds
            Cycle()
        assert died() is not None
        assert old > before
        gc.collect()
        assert died() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0

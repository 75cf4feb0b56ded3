from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.in_process import Ended

Megatrain = Callable[..., Ended]


@pytest.fixture
def megatrain(run_megatrain: Megatrain) -> Megatrain:
    return run_megatrain

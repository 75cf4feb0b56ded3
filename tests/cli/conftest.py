from __future__ import annotations

from collections.abc import Callable

import pytest

from megatrain import cli
from tests.in_process import Ended, caller

Megatrain = Callable[..., Ended]


@pytest.fixture
def megatrain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Megatrain:
    """Runs `megatrain` in this process."""
    return caller("megatrain", cli.main, monkeypatch, capfd)

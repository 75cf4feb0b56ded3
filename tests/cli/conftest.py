from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from megatrain import cli


class Ended(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Megatrain = Callable[..., Ended]


@pytest.fixture
def megatrain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Megatrain:
    """Runs `megatrain` in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["megatrain", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Ended(code, *capfd.readouterr())

    return run

"""docs/commands.md is what the commands' --help says."""

from __future__ import annotations

from pathlib import Path

from tools.command_reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_the_command_reference_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "regenerate it: python -m tools.command_reference > docs/commands.md"
    )

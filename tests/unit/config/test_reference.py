"""docs/config.md is what the schema says."""

from __future__ import annotations

from pathlib import Path

from megatrain.config.keys import leaves
from megatrain.config.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_reference_in_docs_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "regenerate it: python -m megatrain.config.reference > docs/config.md"
    )


def test_the_reference_names_every_key():
    rows = {line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    assert {path.rpartition(".")[2] for path, _ in leaves()} - {"deepspeed", "lora"} <= rows

"""The names of tests: each says in a few words which behaviour it protects."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]
MAX_WORDS = 8


def test_names_have_at_most_eight_words() -> None:
    functions = [
        (path.relative_to(TESTS), node.name)
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert (Path("unit/test_names.py"), "test_names_have_at_most_eight_words") in functions
    assert [f"{path}: {name}" for path, name in functions if name.count("_") > MAX_WORDS] == []


def test_no_two_files_have_one_name() -> None:
    """Of those in folders that are no packages: pytest imports them by name alone."""
    files = [path for path in TESTS.rglob("*.py") if not (path.parent / "__init__.py").exists()]
    places: dict[str, list[str]] = {}
    for path in files:
        places.setdefault(path.name, []).append(str(path.relative_to(TESTS)))
    assert [found for found in places.values() if len(found) > 1 and found[0].rpartition("/")[2] != "conftest.py"] == []

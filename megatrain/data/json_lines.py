"""Objects from a file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megatrain.errors import DataError


def read_objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line, from 1; empty lines are passed over.

    Raises DataError where the file cannot be read, or a line is no object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON: {error}.") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: not a JSON object.")
        found.append((number, value))
    return found

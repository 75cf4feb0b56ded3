"""KEY=VALUE of the command line, put over the plain data of a config before it is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatrain.config import document
from megatrain.config.document import Path
from megatrain.config.keys import is_section, leaves
from megatrain.config.problem import Problem
from megatrain.config.renamed import new_name
from megatrain.config.scalar import scalar
from megatrain.config.schema import FROM_CHECKPOINT, RunConfig
from megatrain.errors import ConfigError


def apply_override(tree: Any, override: str) -> tuple[Any, list[Path], list[Problem]]:
    """The tree with one "section.key=value" set, the paths that now come from it, and what is wrong with it.

    Whether the key exists and the value is legal is checked later, with the whole config.
    """
    key, equals, text = override.partition("=")
    key = new_name(key.strip())
    parts = key.split(".")
    if not equals or not all(parts):
        return tree, [], [Problem("the command line", override, "an override is KEY=VALUE, such as parallel.tensor=2")]
    path = tuple(int(part) if part.isdecimal() else part for part in parts)
    section = RunConfig.model_fields.get(key)
    if section is not None and is_section(section) and (key, text.strip()) != ("model", FROM_CHECKPOINT):
        example = f"{key}.{next(path for path, _ in leaves() if path.startswith(key)).rpartition('.')[2]}"
        return (
            tree,
            [path],
            [Problem(key, scalar(text), f"is a section: set its keys one by one, such as {example}=...")],
        )
    try:
        read = document.read(text, "the value")
        changed = _set(tree, parts, 0, read.tree)
    except (ConfigError, LookupError) as error:
        return tree, [path], [Problem(key, scalar(text), str(error.args[0]))]
    return changed, [path, *((*path, *below) for below in read.lines)], read.problems


def _set(node: Any, parts: Sequence[str], depth: int, value: Any) -> Any:
    """A copy of `node`, which is at parts[:depth], with `value` at parts; LookupError where nothing can be."""
    if depth == len(parts):
        return value
    if isinstance(node, list):
        index = int(parts[depth]) if parts[depth].isdecimal() else len(node)
        if index >= len(node):
            entries = f"a list with the entries 0 to {len(node) - 1}" if node else "an empty list"
            raise LookupError(
                f"{'.'.join(parts[:depth])} is {entries}; a whole list is set by {'.'.join(parts[:depth])}=[...]"
            )
        return [*node[:index], _set(node[index], parts, depth + 1, value), *node[index + 1 :]]
    if node is None:
        node = _default(".".join(parts[:depth]))
        if not isinstance(node, dict):
            return _set(node, parts, depth, value)
    if not isinstance(node, dict):
        raise LookupError(f"{'.'.join(parts[:depth])} has no keys below it")
    return {**node, parts[depth]: _set(node.get(parts[depth]), parts, depth + 1, value)}


def _default(key: str) -> list[Any] | dict[str, Any]:
    """What an override reaches into where the file leaves the key out: the default list, or an empty mapping."""
    default = next((field.default for path, field in leaves() if path == key), None)
    return list(default) if isinstance(default, tuple) else {}

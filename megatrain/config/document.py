"""YAML text into plain data, by the rules of YAML 1.2, with the line of each value.

PyYAML follows YAML 1.1, where `3e-4` is text, `no` is false, `010` is eight and a repeated key silently wins. Here
PyYAML only parses; scalars are read by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2), and a
repeated key, a tag or a document that unfolds without bound is a problem with its line. Of YAML 1.1 the merge key
(`<<: *base`) is kept, as most tools do; keys that begin with `x-` are left out: for anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
import yaml.reader

from megatrain.config.problem import Problem
from megatrain.config.scalar import scalar
from megatrain.errors import ConfigError

Path = tuple[str | int, ...]

MAX_CHARACTERS = 256 * 1024
MAX_VALUES = 20_000  # aliases count as often as they are used, so that a few lines cannot unfold into gigabytes
MAX_DEPTH = 20

_MERGE_KEY, _EXTENSION = "<<", "x-"
_PLAIN_TAGS = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}


@dataclass
class Document:
    """Plain data, the line of each value in it, and what was wrong with the text though it could be read."""

    tree: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(text: str, what: str) -> Document:
    """Parse `text`; `what` names it in the ConfigError that text which is no YAML ends with."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{what}: {len(text)} characters are no config; at most {MAX_CHARACTERS} are read")
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        clauses = (error.context, error.problem) if error.context else (error.problem,)
        reason = ", ".join(clause for clause in clauses if clause)
        raise ConfigError(f"{what}{line}: not valid YAML: {reason}") from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, int(error.position)) + 1
        raise ConfigError(f"{what}, line {number}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{what}: nested too deeply; at most {MAX_DEPTH} levels are read") from None
    document = Document()
    if node is not None:
        document.tree = _Unfolding(document, what).value(node, ())
    return document


class _Unfolding:
    """Turns PyYAML's nodes into values, counting them, as aliases may repeat a node without end."""

    def __init__(self, document: Document, what: str) -> None:
        self.document, self.what, self.num_values = document, what, 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        self._count(node, len(path))
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in _PLAIN_TAGS:
            reason = "tags are not used in a config: write the plain value"
            self.document.problems.append(Problem(_dotted(path), node.tag, reason))
            return None
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(child, (*path, key)) for key, child in self._entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        return scalar_of(node)

    def _count(self, node: yaml.Node, depth: int) -> None:
        self.num_values += 1
        if self.num_values > MAX_VALUES or depth > MAX_DEPTH:
            limit = f"{MAX_VALUES} values" if self.num_values > MAX_VALUES else f"{MAX_DEPTH} levels"
            where = f"{self.what}, line {node.start_mark.line + 1}"
            raise ConfigError(f"{where}: more than {limit}, aliases unfolded; no config needs that")

    def _entries(self, node: yaml.MappingNode, path: Path, num_merges: int = 0) -> Iterator[tuple[str, yaml.Node]]:
        """The entries of a mapping, the first of each key; a repeated key is noted with both lines. Then those that it
        merges in, but for keys that it has."""
        self._count(node, len(path) + num_merges)
        first_lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                reason = f"line {line}: a key must be one word"
                self.document.problems.append(Problem(_dotted(path), "a list or mapping as key", reason))
                continue
            if key_node.value == _MERGE_KEY and key_node.style is None:
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if key_node.value.startswith(_EXTENSION):
                continue
            key = key_node.value
            if key in first_lines:
                reason = f"line {line}: duplicate key, first on line {first_lines[key]}; keep one"
                self.document.problems.append(Problem(_dotted((*path, key)), scalar_of(child), reason))
                continue
            first_lines[key] = line
            self.document.lines[(*path, key)] = line
            yield key, child
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                reason = f"line {source.start_mark.line + 1}: {_MERGE_KEY} merges a mapping, or a list of mappings"
                self.document.problems.append(Problem(_dotted((*path, _MERGE_KEY)), scalar_of(source), reason))
                continue
            for key, child in self._entries(source, path, num_merges + 1):
                if key not in first_lines:
                    first_lines[key] = child.start_mark.line + 1
                    yield key, child


def scalar_of(node: yaml.Node) -> object:
    """The node's value where it is a scalar, else what kind of value it is; for messages."""
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path) or "the document"

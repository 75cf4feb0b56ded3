"""One thing that is wrong with a config, and how several of them read together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from megatrain.config.scalar import scalar
from megatrain.errors import ConfigError

NOT_GIVEN = object()
SEPARATOR = " or "


@dataclass(frozen=True)
class Problem:
    """A value that is refused: its key, what was given, what is allowed, and what is nearest to it.

    `key` is the full path ("parallel.tensor"), `given` the value (NOT_GIVEN where a required key is missing), `reason`
    a clause that says what is allowed or why it is refused, `nearest` the nearest legal values of the key, joined by
    "or", or where `is_value` is false something else, such as another key.
    """

    key: str
    given: object
    reason: str
    nearest: str | None = None
    is_value: bool = True

    def below(self, prefix: str) -> Problem:
        """The same problem with the path of its section before its key."""
        return replace(self, key=prefix + self.key)

    def text(self, source: str = "") -> str:
        """One line for the user; `source` is where the value comes from, such as "line 7"."""
        value = "is missing" if self.given is NOT_GIVEN else f"{as_yaml(self.given)} given"
        key = self.key or "all of it"
        head = f"{key} ({source})" if source else key
        nearest = f"; nearest: {self.nearest}" if self.nearest is not None else ""
        return f"{head}: {value}; {self.reason}{nearest}"


def as_yaml(value: object) -> str:
    """The value as a user would write it in YAML, shortened where it is long."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, str):
        is_plain = value == value.strip() and scalar(value) == value
        text = value if is_plain else f'"{value}"'
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(as_yaml(item) for item in value[:9]) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in list(value.items())[:9]) + "}"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def alternatives(values: Iterable[object]) -> str:
    """The values as alternatives: "8 or 16"."""
    return SEPARATOR.join(map(str, values))


def config_error(what: str, problems: Sequence[Problem], source: Callable[[str], str] = lambda key: "") -> ConfigError:
    """The error that lists every problem; `what` is the config's name, `source` says where a key comes from."""
    lines: Iterable[str] = (problem.text(source(problem.key)) for problem in problems)
    if len(problems) == 1:
        return ConfigError(f"{what}: {next(iter(lines))}")
    return ConfigError("\n".join([f"{what}: {len(problems)} problems", *(f"  {line}" for line in lines)]))
